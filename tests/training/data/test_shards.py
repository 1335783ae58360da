"""Batches from shards."""

import json
import multiprocessing
import re
import sys
from collections import Counter
from itertools import islice

import pytest
import torch

from tests.pictures import encoded, picture
from tests.training.data.samples import SHAPES, all_same, samples_of, take, write_shard
from wuerstchen_core import WuerstchenError
from wuerstchen_core.training.data import shards as shards_module
from wuerstchen_core.training.data.batches import open_batches
from wuerstchen_core.training.data.buckets import bucket_sizes, crop_and_resize, nearest_size
from wuerstchen_core.training.data.shards import Shards
from wuerstchen_core.util import pictures


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
    for batch, number in zip(batches, numbers, strict=True):
        assert batch["key"][0].endswith(f".tar/{number:02}")
        pixels = torch.from_numpy(picture(number, SHAPES[number % 5])).permute(2, 0, 1) / 255
        expected = crop_and_resize(pixels, nearest_size(sizes, SHAPES[number % 5]))
        assert torch.equal(batch["image"][0], (expected * 255).round().byte())


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
