"""The cache of features."""

import zlib

import pytest
import torch

from tests.pictures import encoded, picture
from tests.training.data.samples import same, take, write_folder
from wuerstchen_core import WuerstchenError
from wuerstchen_core.training.data.batches import open_batches
from wuerstchen_core.training.data.feature_cache import FeatureCache, address, fingerprint, stacked
from wuerstchen_core.util import pictures


def features_of(batch):
    """Something that tells samples apart, in a size that follows from the picture's."""
    return {
        "semantic": batch["image"][:, :, ::32, ::32].half(),
        "text": torch.tensor([[zlib.crc32(text.encode()) % 1000] for text in batch["caption"]]).bfloat16(),
    }


@pytest.fixture(params=["folder", "shards"])
def data(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_come_from_the_cache_once_they_are_there(data, tmp_path, workers, monkeypatch):
    cache = FeatureCache(tmp_path / "cache", "weights")
    options = {"workers": workers, "cache": cache}
    expected = []
    for batch in open_batches(data, 192, 3, **options):
        if len(expected) == 20:
            break
        if "image" in batch:
            cache.write(batch["address"], features_of(batch))
            expected.append(features_of(batch))
        else:
            expected.append(batch["features"])
    again = take(20, data, 192, 3, **options)
    plain = take(20, data, 192, 3, workers=workers)
    for batch, features, seen in zip(again, expected, plain):
        assert "image" not in batch and batch["key"] == seen["key"] and batch["caption"] == seen["caption"]
        assert same(batch["features"], features) and same(features, features_of(seen))
    monkeypatch.setattr(pictures, "decode", lambda *arguments: pytest.fail("decoded"))
    take(20, data, 192, 3, cache=cache) if workers == 0 else None


def test_a_bad_picture_does_not_keep_its_batch_from_the_cache(folder, tmp_path):
    (folder / "03.png").write_bytes(b"no picture")
    cache = FeatureCache(tmp_path / "cache", "weights")
    whole = take(20, folder, 64, 4, cache=cache)
    for batch in whole:
        cache.write(batch["address"], features_of(batch))
    again = take(20, folder, 64, 4, cache=cache)
    assert [batch["skipped"] for batch in again] == [batch["skipped"] for batch in whole]
    assert all("features" in batch and batch["key"] == seen["key"] for batch, seen in zip(again, whole))


def test_a_batch_with_one_sample_missing_comes_with_all_its_pictures(tmp_path):
    folder = write_folder(tmp_path / "pictures", 4, [(64, 64)])
    cache = FeatureCache(tmp_path / "cache", "weights")
    (whole,) = take(1, folder, 64, 4, cache=cache)
    cache.write(whole["address"][1:], {"a": torch.zeros(3, 2)})
    assert same(take(1, folder, 64, 4, cache=cache)[0], whole)
    cache.write(whole["address"][:1], {"a": torch.zeros(1, 3)})  # of another length: it does not stack
    assert same(take(1, folder, 64, 4, cache=cache)[0], whole)


def test_features_are_of_one_picture_caption_size_and_set_of_weights(tmp_path):
    folder = write_folder(tmp_path / "pictures", 4, [(64, 64)])
    cache = FeatureCache(tmp_path / "cache", "weights")

    def cached(size=64, cache=cache):
        return "features" in take(1, folder, size, 4, cache=cache)[0]

    def fill():
        (batch,) = take(1, folder, 64, 4, cache=cache)
        cache.write(batch["address"], {"a": torch.zeros(4, 2)})
        assert cached()

    fill()
    assert not cached(size=192) and not cached(cache=FeatureCache(tmp_path / "cache", "other weights"))
    (folder / "02.txt").write_text("another caption")
    assert not cached()
    fill()
    (folder / "02.png").write_bytes(encoded(picture(77)))
    assert not cached()
    parts = ("key", "stamp", (64, 128), "caption")
    changed = [("k", *parts[1:]), (*parts[:1], "s", *parts[2:]), (*parts[:2], (128, 64), parts[3]), (*parts[:3], "c")]
    assert len({address(*parts), *(address(*other) for other in changed)}) == 5


def test_the_cache_gives_back_what_it_was_given_or_nothing(tmp_path):
    cache = FeatureCache(tmp_path, "weights")
    names = [address(str(number), "", (64, 64), "") for number in range(3)]
    given = {"latent": torch.randn(3, 4, 8, 8).half(), "text": torch.randn(3, 77, 8).bfloat16(), "n": torch.arange(3)}
    cache.write(names, given)
    assert same(cache.read(names), given) and same(cache.read(names[1:2]), {k: v[1:2] for k, v in given.items()})
    assert cache.read([*names, address("3", "", (64, 64), "")]) is None
    (path,) = tmp_path.glob(f"*/{names[1][:2]}/{names[1][2:]}.safetensors")
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole[:-1] + b"\x7f", whole[:-64] + bytes(64), b"\xff" * 64):
        path.write_bytes(damaged)
        assert cache.read(names) is None and cache.read([names[0], names[2]]) is not None
    cache.write(names[1:2], {name: tensor[1:2] for name, tensor in given.items()})
    assert same(cache.read(names), given) and not list(tmp_path.rglob("*.partial"))


def test_features_that_do_not_go_together_are_not_stacked():
    one = {"a": torch.zeros(2), "b": torch.zeros(3)}
    assert stacked([one, one])["b"].shape == (2, 3)
    for other in ({"a": torch.zeros(2)}, {**one, "b": torch.zeros(4)}, {**one, "b": torch.zeros(3).half()}):
        assert stacked([one, other]) is None
    assert stacked([]) is None


def test_a_fingerprint_changes_with_any_byte_and_with_the_order(tmp_path):
    one, other = tmp_path / "one", tmp_path / "set" / "other"
    other.parent.mkdir()
    one.write_bytes(bytes(5 << 20))
    other.write_bytes(b"weights")
    seen = {fingerprint(one), fingerprint(other), fingerprint(one, other), fingerprint(other, one)}
    assert fingerprint(other) in seen and fingerprint(tmp_path / "set") == fingerprint(other)
    one.write_bytes(bytes(5 << 20)[:-1] + b"\1")
    seen.add(fingerprint(one))
    one.write_bytes(b"\1" + bytes(5 << 20)[1:])
    seen.add(fingerprint(one))
    assert len(seen) == 6
    with pytest.raises(WuerstchenError, match="nowhere: cannot be read"):
        fingerprint(tmp_path / "nowhere")


def test_a_cache_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WuerstchenError, match="file: features can't be kept there"):
        FeatureCache(tmp_path / "file", "weights")
    cache = FeatureCache(tmp_path / "cache", "weights")
    (cache.folder / "ab").touch()
    with pytest.raises(WuerstchenError, match="could not be written"):
        cache.write(["ab" * 32], {"a": torch.zeros(1)})
