"""Training data: what is in a batch, that a run resumes to the same ones, and that nothing bad ends it."""

import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import sys
import tarfile
import zlib
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from wuerstchen_core import WuerstchenError, pictures
from wuerstchen_core.training import shards as shards_module
from wuerstchen_core.training.buckets import bucket_sizes, fit, nearest_size
from wuerstchen_core.training.data import open_batches
from wuerstchen_core.training.emoji import EmojiSet
from wuerstchen_core.training.feature_cache import FeatureCache, address, fingerprint, stacked
from wuerstchen_core.training.shards import Shards
from wuerstchen_core.training.sources import EmojiSource, FixedSource, FolderSource, Source

SHAPES = [(64, 64), (40, 60), (60, 40), (30, 70), (50, 48)]  # (height, width)


def picture(number, shape=(64, 64)):
    """Noise of its own for every number, so that no two pictures are taken for each other."""
    return np.random.default_rng(number).integers(0, 256, (*shape, 3), dtype=np.uint8)


def encoded(pixels, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def write_folder(folder, count, shapes=SHAPES):
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02}.png").write_bytes(encoded(picture(number, shapes[number % len(shapes)])))
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    return folder


def write_shard(path, files):
    """files: (name, content) in order"""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples_of(numbers, shapes=SHAPES):
    for number in numbers:
        yield f"{number:02}.png", encoded(picture(number, shapes[number % len(shapes)]))
        yield f"{number:02}.txt", f"picture {number}".encode()


def take(count, *arguments, **options):
    batches = open_batches(*arguments, **options)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items())


def all_same(ones, others):
    return len(ones) == len(others) and all(map(same, ones, others))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures", 23)


@pytest.fixture
def shards(tmp_path):
    """Three shards of 5, 6 and 7 samples."""
    for number, numbers in enumerate((range(5), range(5, 11), range(11, 18))):
        write_shard(tmp_path / f"{number}.tar", samples_of(numbers))
    return str(tmp_path / "{0..2}.tar")


# Pictures


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_and_their_size_is_known_without_decoding(format, orientation, monkeypatch):
    rows, columns = np.mgrid[0:40, 0:64]
    upright = np.stack([rows * 6, columns * 4, 0 * rows], axis=-1).astype(np.uint8)
    transposed = {  # EXIF 2.3, "Orientation": how the stored rows and columns lie in the picture
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: upright.swapaxes(0, 1)[::-1], 7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }  # fmt: skip
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(np.ascontiguousarray(transposed[orientation]), format, exif=exif, quality=95)
    decoded = pictures.decode(io.BytesIO(content))
    assert decoded.shape == (40, 64, 3)
    assert (decoded * 255 - torch.from_numpy(upright)).abs().mean() < 3
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
        assert pictures.size_of(io.BytesIO(content)) == (40, 64)


def test_transparency_is_laid_on_white_and_grey_of_16_bits_keeps_its_tones():
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 51], [1, 2, 3, 0]]], dtype=np.uint8)
    decoded = pictures.decode(io.BytesIO(encoded(pixels)))[0] * 255
    expected = [[200, 100, 0], [255 - 55 / 5, 255 - 155 / 5, 255 - 255 / 5], [255, 255, 255]]
    torch.testing.assert_close(decoded, torch.tensor(expected), rtol=0, atol=1)
    grey = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    decoded = pictures.decode(io.BytesIO(encoded(grey)))[0] * 255
    torch.testing.assert_close(decoded, torch.tensor([0.0, 0x12, 0x80, 0xFF])[:, None].expand(4, 3))


# Buckets


def test_buckets_have_about_one_area_and_sides_of_64():
    assert bucket_sizes(256) == [(384, 192), (320, 192), (256, 256), (192, 320), (192, 384)]
    assert bucket_sizes(512) == [
        (704, 384), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640), (384, 704)
    ]  # fmt: skip
    for size in (64, 128, 384, 768, 1024):
        sizes = bucket_sizes(size)
        assert (size, size) in sizes and {(w, h) for h, w in sizes} == set(sizes)
        for h, w in sizes:
            assert h % 64 == w % 64 == 0 and max(h, w) <= 2 * min(h, w)
            assert 0.85 < h * w / size**2 < 1.15
    with pytest.raises(WuerstchenError, match="size is 200: with buckets it must be a multiple of 64"):
        bucket_sizes(200)


def test_the_nearest_ratio_is_nearest_as_ratios_compare():
    sizes = [(64, 128), (64, 64), (128, 64)]
    root = math.sqrt(2)
    assert nearest_size(sizes, (100, 99)) == (64, 64) and nearest_size(sizes, (10, 1000)) == (64, 128)
    assert nearest_size(sizes, (1000, round(1000 * root) - 1)) == (64, 64)
    assert nearest_size(sizes, (1000, round(1000 * root) + 1)) == (64, 128)
    assert nearest_size(sizes, (round(1000 * root) + 1, 1000)) == (128, 64)


@pytest.mark.parametrize("shape, box", [((120, 96), (0, 12, 96, 108)), ((96, 120), (12, 0, 108, 96)), ((40, 40), None)])
def test_a_picture_is_scaled_as_pillow_does_and_its_middle_kept(shape, box):
    pixels = picture(3, shape)
    planes = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    expected = np.stack([np.array(plane.crop(box).resize((64, 64), Image.Resampling.BICUBIC)) for plane in planes])
    fitted = fit(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, (64, 64))
    torch.testing.assert_close(fitted, torch.from_numpy(expected / 255).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_picture_of_the_right_size_is_left_alone_and_a_thread_of_one_is_no_trouble():
    image = torch.rand(3, 128, 64)
    assert torch.equal(fit(image, (128, 64)), image)
    assert fit(torch.rand(3, 30000, 1), (64, 128)).shape == (3, 64, 128)  # scaled whole it would take 88 GB


# Folders


def test_a_batch_holds_the_pictures_and_captions_of_its_keys(folder, tmp_path):
    (folder / "sub.one").mkdir()
    (folder / "sub.one" / "A.b.JPEG").write_bytes(encoded(picture(90), "JPEG", quality=95))
    (folder / "sub.one" / "A.b.txt").write_bytes(b"\xef\xbb\xbf a caf\xc3\xa9 \n")
    (folder / "bare.webp").write_bytes(encoded(picture(91), "WEBP", lossless=True))
    (folder / "empty.png").write_bytes(encoded(picture(92)))
    (folder / "empty.txt").touch()
    for name in ("._hidden.png", "notes.txt", "movie.mp4"):
        (folder / name).write_bytes(b"no picture")
    expected = {f"{n:02}.png": f"picture {n}" for n in range(23)}
    expected |= {"sub.one/A.b.JPEG": "a café", "bare.webp": "", "empty.png": ""}
    seen = {}
    for batch in take(52, folder, 64, 1, buckets=False):
        assert batch["image"].shape == (1, 3, 64, 64) and batch["image"].dtype == torch.float32
        assert batch.keys() == {"image", "caption", "key", "skipped"} and batch["skipped"] == 0
        seen[batch["key"][0]] = batch["caption"][0]
        number = {"bare.webp": 91, "empty.png": 92, "00.png": 0, "05.png": 5}.get(batch["key"][0])
        if number is not None:
            assert torch.equal(batch["image"][0], torch.from_numpy(picture(number)).permute(2, 0, 1) / 255)
    assert seen == expected


def test_every_picture_is_seen_once_an_epoch_in_its_bucket(folder):
    source, sizes = FolderSource(folder), bucket_sizes(192)
    batches = take(60, folder, 192, 1)
    keys = [batch["key"][0] for batch in batches]
    epochs = [keys[start : start + 23] for start in (0, 23)]
    assert set(epochs[0]) == set(epochs[1]) == set(source.keys) and epochs[0] != epochs[1] != sorted(epochs[1])
    for batch, key in zip(batches, keys):
        shape = SHAPES[int(key[:2]) % len(SHAPES)]
        assert tuple(batch["image"].shape[2:]) == nearest_size(sizes, shape)
    assert [batch["key"][0] for batch in take(23, folder, 192, 1, seed=1)] != epochs[0]


def test_what_is_left_over_goes_on_into_the_next_epoch(folder):
    """In 10 epochs of 23 pictures, 5 buckets hold at most 3 back: no picture falls behind."""
    seen = Counter(key for batch in take(54, folder, 192, 4) for key in batch["key"])
    assert len(seen) == 23 and min(seen.values()) >= 8 and max(seen.values()) <= 11


def test_three_pictures_fill_a_batch_of_eight(tmp_path):
    folder = write_folder(tmp_path / "few", 3)
    for batch in take(5, folder, 64, 8):
        assert len(batch["key"]) == 8 and len(batch["image"]) == 8


@pytest.mark.parametrize("buckets", [True, False])
def test_two_ranks_see_what_one_with_twice_the_batch_sees(folder, buckets):
    (folder / "02.png").write_bytes(b"no picture")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:300])
    together = take(16, folder, 192, 6, buckets=buckets)
    halves = [take(16, folder, 192, 3, buckets=buckets, rank=rank, world=2) for rank in range(2)]
    assert sum(batch["skipped"] for batch in together) > 2
    for whole, first, second in zip(together, *halves):
        assert torch.equal(whole["image"], torch.cat([first["image"], second["image"]]))
        assert whole["key"] == first["key"] + second["key"]
        assert whole["caption"] == first["caption"] + second["caption"]
        assert whole["skipped"] == first["skipped"] + second["skipped"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [1, 7, 11])
def test_a_resumed_run_sees_the_same_batches(folder, workers, first):
    """23 pictures in batches of 4: after the fifth, batches mix two epochs."""
    (folder / "03.png").write_bytes(b"no picture")
    whole = take(14, folder, 192, 4, seed=5)
    assert len({batch["image"].shape for batch in whole}) > 1 and any(batch["skipped"] for batch in whole)
    assert all_same(take(14 - first, folder, 192, 4, seed=5, workers=workers, first=first), whole[first:])


def test_loading_leaves_the_random_states_of_training_alone(folder):
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        take(3, folder, 64, 4, workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_the_workers_end_with_the_batches(folder):
    batches = open_batches(folder, 64, 4, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_ctrl_c_is_the_parents_alone(folder, capfd):
    """A terminal sends it to all processes; the parent may want to finish its step, or to save."""
    batches = open_batches(folder, 64, 4, workers=2)
    taken = list(islice(batches, 2))  # one of each worker, so that both are at work
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    taken += islice(batches, 10)
    batches.close()
    assert all_same(taken, take(12, folder, 64, 4)) and capfd.readouterr().err == ""


# Bad samples


def bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    return encoded(picture(0, (80, 80)))  # more pixels than allowed, less than twice as many: Pillow only warns


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("04.png", b"", "cannot identify"),
        ("04.png", b"GIF89a no picture", "cannot identify"),
        ("04.png", lambda good: good[:500], "truncated"),
        ("04.png", lambda good: good[:20], "Truncated"),
        ("04.txt", "caf\u00e9".encode("latin-1"), "utf-8"),
        ("04.png", bomb, "decompression bomb"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_skipped_counted_and_named(tmp_path, name, content, says, workers, monkeypatch, caplog):
    folder = write_folder(tmp_path / "pictures", 8, [(64, 64)])
    if callable(content):
        content = content(monkeypatch) if content is bomb else content((folder / name).read_bytes())
    (folder / name).write_bytes(content)
    batches = take(8, folder, 64, 4, workers=workers)
    assert [batch["skipped"] for batch in batches].count(1) == 4 == sum(batch["skipped"] for batch in batches)
    assert all(len(batch["key"]) == 4 and "04.png" not in batch["key"] for batch in batches)
    for batch in batches:
        for key, image, caption in zip(batch["key"], batch["image"], batch["caption"]):
            assert caption == f"picture {int(key[:2])}"
            assert torch.equal(image, torch.from_numpy(picture(int(key[:2]))).permute(2, 0, 1) / 255)
    assert len(caplog.records) == 1  # however often it comes
    assert re.search(f"skipped 04.png: .*({says})", caplog.text)


def test_only_the_first_bad_samples_are_named(folder, caplog):
    for number in range(12):
        (folder / f"{number:02}.png").write_bytes(b"no picture")
    take(24, folder, 64, 2, buckets=False)
    assert len(caplog.records) == 5 and "only counted" in caplog.messages[-1]


def test_one_good_picture_among_bad_ones_is_found(folder):
    for path in sorted(folder.glob("*.png"))[1:]:
        path.write_bytes(b"no picture")
    for batch in take(8, folder, 192, 2):
        assert batch["key"] == ["00.png", "00.png"] and batch["skipped"] >= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_good_is_an_error_of_one_line(folder, workers):
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(WuerstchenError, match=r"^not one sample can be read; \d\d.png: cannot identify") as error:
        take(1, folder, 64, 2, workers=workers)
    assert "Traceback" not in str(error.value) and not multiprocessing.active_children()


def test_what_is_not_there_is_named_before_the_first_batch(tmp_path):
    with pytest.raises(WuerstchenError, match="nowhere: there is no such folder"):
        open_batches(tmp_path / "nowhere", 64, 2)
    with pytest.raises(WuerstchenError, match="there is no picture in it"):
        open_batches(tmp_path, 64, 2)
    for name, value in (("batch", 0), ("workers", -1), ("first", -1)):
        with pytest.raises(WuerstchenError, match=f"{name} is {value}"):
            open_batches(tmp_path, 64, **{"batch": 1, name: value})


# Emoji, and sources of one's own


def test_emoji_are_drawn_anew_each_time_and_the_same_for_every_number_of_ranks(emoji):
    source = EmojiSource(emoji)
    assert isinstance(source, Source) and not isinstance(source, FixedSource)
    assert len(source) == 6 and source.size(0) == (256, 256) and source.key(4) == "noto/green disc"
    image, caption = source.load(4, random.Random(3))
    generator = random.Random(3)
    expected, description = EmojiSet(emoji).draw(4, generator)
    assert torch.equal(image, expected) and ("disc" in caption.lower() or "round" in caption.lower())
    batches = take(12, source, 256, 2, workers=1)
    assert len({(key, caption) for batch in batches for key, caption in zip(batch["key"], batch["caption"])}) > 12
    halves = [take(12, source, 256, 1, rank=rank, world=2) for rank in range(2)]
    for whole, first, second in zip(batches, *halves):
        assert torch.equal(whole["image"], torch.cat([first["image"], second["image"]]))
        assert whole["caption"] == first["caption"] + second["caption"]
    copied = pickle.dumps(source)
    assert len(copied) < 1000 and same_sample(pickle.loads(copied).load(4, random.Random(3)), (image, caption))


def same_sample(one, other):
    return torch.equal(one[0], other[0]) and one[1] == other[1]


def test_emoji_can_not_be_cached(emoji, tmp_path):
    with pytest.raises(WuerstchenError, match="EmojiSource vary: their features can't be cached"):
        open_batches(EmojiSource(emoji), 256, 2, cache=FeatureCache(tmp_path / "cache", "x"))


# Shards


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 20])
def test_the_streams_together_see_every_sample_once_an_epoch(shards, streams):
    """Of whole shards where there are enough of them; 20 streams share 18 samples, and in time each sees all."""
    reader = Shards(shards_module.expand(shards), [(64, 64)], batch=1, seed=0)

    def seen(epochs, streams_seen):
        return Counter(
            sample["txt"].decode()
            for epoch in epochs
            for stream in streams_seen
            for sample in reader._samples(epoch, stream, streams, [])
        )

    expected = Counter({f"picture {number}": 1 for number in range(18)})
    for epoch in range(3):
        assert seen([epoch], range(streams)) == expected
    for stream in {0, streams - 1}:
        assert seen(range(streams), [stream]) == expected
        assert {batch.samples[0].caption for batch in islice(reader.batches(stream, streams), 18)} == set(expected)


def test_too_few_shards_are_shared_evenly_and_a_bad_one_is_told_once(tmp_path):
    urls = [str(write_shard(tmp_path / f"{number}.tar", samples_of([number]))) for number in range(3)]
    reader = Shards([*urls, str(tmp_path / "missing.tar")], [(64, 64)], batch=1, seed=0)
    for epoch in range(5):
        skipped = []
        assert sorted(len([*reader._samples(epoch, stream, 5, skipped)]) for stream in range(5)) == [0, 0, 1, 1, 1]
        assert len(skipped) == 1 and "missing.tar" in skipped[0]


def test_shards_give_their_pictures_shuffled_and_in_buckets(shards):
    sizes = bucket_sizes(192)
    batches = take(36, shards, 192, 1)
    numbers = [int(batch["caption"][0].split()[1]) for batch in batches]
    assert sorted(numbers[:18]) == sorted(numbers[18:]) == list(range(18))
    assert numbers[:18] != numbers[18:] and numbers[:18] != sorted(numbers[:18])
    for batch, number in zip(batches, numbers):
        assert batch["key"][0].endswith(f".tar/{number:02}")
        pixels = torch.from_numpy(picture(number, SHAPES[number % 5])).permute(2, 0, 1) / 255
        assert torch.equal(batch["image"][0], fit(pixels, nearest_size(sizes, SHAPES[number % 5])))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_resumed_run_sees_the_same_batches_of_shards(shards, tmp_path, workers):
    write_shard(tmp_path / "3.tar", [*samples_of([20]), ("21.png", b"no picture"), *samples_of([22])])
    urls = [shards, str(tmp_path / "3.tar"), str(tmp_path / "missing.tar")]
    options = {"workers": workers, "world": 2, "rank": 1, "seed": 4}
    whole = take(20, urls, 192, 2, **options)
    assert any(batch["skipped"] for batch in whole)
    for first in (1, 6, 13):
        assert all_same(take(20 - first, urls, 192, 2, first=first, **options), whole[first:])


def test_resuming_shards_decodes_nothing_that_was_seen(shards, monkeypatch):
    decoded = []
    decode = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    take(2, shards, 192, 3, first=40)
    assert len(decoded) == 6


def test_captions_are_in_text_or_json(tmp_path):
    png = encoded(picture(0))
    files = [
        ("a.png", png), ("a.txt", "Grüße\n".encode()),
        ("b.JPG", encoded(picture(0), "JPEG")), ("b.json", json.dumps({"caption": "of b", "width": 3}).encode()),
        ("c.webp", encoded(picture(0), "WEBP")), ("c.npy", b"unread"),
        ("d.png", png), ("d.json", json.dumps({"other": 1}).encode()),
        ("bad1.png", png), ("bad1.json", b"{"), ("bad2.png", png), ("bad2.json", json.dumps({"caption": 3}).encode()),
        ("bad3.png", png), ("bad3.txt", b"\xff"), ("bad4.txt", b"no picture"), ("bad5.png", b"no picture"),
    ]  # fmt: skip
    batches = take(4, write_shard(tmp_path / "x.tar", files), 64, 1)
    seen = {batch["key"][0].rpartition("/")[2]: batch["caption"][0] for batch in batches}
    assert seen == {"a": "Grüße", "b": "of b", "c": "", "d": ""}
    assert sum(batch["skipped"] for batch in take(8, tmp_path / "x.tar", 64, 1)) in range(5, 11)


def test_pictures_cut_short_in_a_shard_are_skipped_even_alone_in_their_batch(tmp_path, caplog):
    cut = [(f"bad{number}.png", encoded(picture(number))[:500]) for number in range(4)]
    write_shard(tmp_path / "x.tar", [*samples_of([0]), *cut, *samples_of([5])])
    batches = take(18, tmp_path / "x.tar", 64, 1)
    assert sum(batch["skipped"] for batch in batches) >= 12 and len(caplog.records) == 4
    assert {batch["caption"][0] for batch in batches} == {"picture 0", "picture 5"}
    assert re.search("x.tar/bad.: image file is truncated", caplog.text)
    for first in range(1, 18):
        assert all_same(take(18 - first, tmp_path / "x.tar", 64, 1, first=first), batches[first:])


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("bad.tar", b"<html>not found</html>" * 100, "invalid header"),
        ("bad.tar", b"", "empty file"),
        ("bad.tar", lambda tar: tar[:24000], "unexpected end of data"),
        ("bad.tar", lambda tar: tar[: tar.index(b"12.png")], "cut short"),
        ("missing.tar", b"", "No such file"),
        ("pipe:exit 3", b"", "bad|empty|exit 3"),
        ("pipe:cat {}/2.tar; exit 3", b"", "its command ended with exit 3"),
        ("gopher://host/x.tar", b"", "no gopen handler"),
    ],
)
def test_a_bad_shard_is_named_and_what_can_be_read_of_it_is_used(shards, tmp_path, name, content, says, caplog):
    if callable(content):
        content = content((tmp_path / "2.tar").read_bytes())
    (tmp_path / "bad.tar").write_bytes(content)
    url = name.format(tmp_path) if ":" in name else str(tmp_path / name)
    batches = take(60, [shards.replace("2}", "1}"), url], 64, 1)
    seen = {int(batch["caption"][0].split()[1]) for batch in batches}
    rest = seen - set(range(11))
    assert seen >= set(range(11)) and bool(rest) == (len(content) > 4000 or "cat" in name)
    assert rest == set(range(11, 18)) if "cat" in name else 17 not in rest
    assert 3 <= sum(batch["skipped"] for batch in batches) <= 6  # once an epoch
    assert len(caplog.records) == 1 and url in caplog.text and re.search(says, caplog.text)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_good_shard_is_an_error_that_names_them(tmp_path, workers):
    (tmp_path / "1.tar").write_bytes(b"no archive" * 1000)
    write_shard(tmp_path / "2.tar", [("a.png", b"no picture"), ("b.txt", b"no picture")])
    write_shard(tmp_path / "3.tar", [])
    with pytest.raises(WuerstchenError, match="no shard holds a sample that can be read; .*0.tar.*1.tar|2.tar"):
        take(1, str(tmp_path / "{0..3}.tar"), 64, 2, workers=workers)
    assert not multiprocessing.active_children()


def test_shards_of_pictures_that_can_not_be_decoded_are_an_error_too(tmp_path):
    write_shard(tmp_path / "x.tar", [(f"{n}.png", encoded(picture(n))[:500]) for n in range(4)])
    with pytest.raises(WuerstchenError, match="not one sample can be read; .*x.tar/.: image file is truncated"):
        take(1, tmp_path / "x.tar", 64, 2)


def test_pipes_and_s3_are_read_by_commands(shards, tmp_path, monkeypatch):
    files = take(18, shards, 64, 1)
    pipes = take(18, f"pipe:cat {shards}", 64, 1)
    assert [b["caption"] for b in pipes] == [b["caption"] for b in files]
    with pytest.raises(WuerstchenError, match="pip install awscli"):
        monkeypatch.setenv("PATH", str(tmp_path))
        open_batches("s3://bucket/it's {0..2}.tar", 64, 1)
    program = tmp_path / "aws"
    program.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec /bin/cat "{tmp_path}/${{3##*/it?s }}"\n')
    program.chmod(0o755)
    remote = take(18, "s3://bucket/it's {0..2}.tar", 64, 1)
    assert [b["caption"] for b in remote] == [b["caption"] for b in files]


def test_what_names_no_shards_is_told_at_once(tmp_path):
    with pytest.raises(WuerstchenError, match="photos: there is no such folder"):
        open_batches("photos", 64, 1)
    with pytest.raises(WuerstchenError, match="x.png: neither a folder nor a shard"):
        open_batches(["a.tar", "x.png"], 64, 1)
    with pytest.raises(WuerstchenError, match=r"\{0..tar: not the names of shards"):
        open_batches("{0..tar", 64, 1)
    with pytest.raises(WuerstchenError, match="there is no shard"):
        open_batches([], 64, 1)


def test_without_webdataset_folders_work_and_shards_say_what_to_install(folder, shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    assert len(take(1, folder, 64, 4)[0]["key"]) == 4
    with pytest.raises(WuerstchenError, match="pip install webdataset"):
        open_batches(shards, 64, 4)


# The cache of features


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
