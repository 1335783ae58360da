"""Batches from folders: what is in them, that a run resumes to the same ones, and that nothing bad ends it."""

import multiprocessing
import os
import random
import re
import signal
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import encoded, picture
from tests.training.data.samples import SHAPES, all_same, take, write_folder
from wuerstchen_core import WuerstchenError
from wuerstchen_core.training.data.batches import open_batches
from wuerstchen_core.training.data.buckets import bucket_sizes, nearest_size
from wuerstchen_core.training.data.sources import FolderSource

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
        assert batch["image"].shape == (1, 3, 64, 64) and batch["image"].dtype == torch.uint8
        assert batch.keys() == {"image", "caption", "key", "skipped"} and batch["skipped"] == 0
        seen[batch["key"][0]] = batch["caption"][0]
        number = {"bare.webp": 91, "empty.png": 92, "00.png": 0, "05.png": 5}.get(batch["key"][0])
        if number is not None:
            assert torch.equal(batch["image"][0], torch.from_numpy(picture(number)).permute(2, 0, 1))
    assert seen == expected


def test_every_picture_is_seen_once_an_epoch_in_its_bucket(folder):
    source, sizes = FolderSource(folder), bucket_sizes(192)
    batches = take(60, folder, 192, 1)
    keys = [batch["key"][0] for batch in batches]
    epochs = [keys[start : start + 23] for start in (0, 23)]
    assert set(epochs[0]) == set(epochs[1]) == set(source.keys) and epochs[0] != epochs[1] != sorted(epochs[1])
    for batch, key in zip(batches, keys, strict=True):
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
    for whole, first, second in zip(together, *halves, strict=True):
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
        for key, image, caption in zip(batch["key"], batch["image"], batch["caption"], strict=True):
            assert caption == f"picture {int(key[:2])}"
            assert torch.equal(image, torch.from_numpy(picture(int(key[:2]))).permute(2, 0, 1))
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
