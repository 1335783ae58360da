"""Shards that are read by an index: resumption without reading, by any number of processes, and filters."""

import gzip
import json
import os
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from tests.pictures import encoded, picture
from tests.training.data.samples import all_same, samples_of, take, write_shard
from wuerstchen_core import WuerstchenError
from wuerstchen_core.training.data import shard_index
from wuerstchen_core.training.data.batches import open_batches
from wuerstchen_core.training.data.filters import Filters, scores
from wuerstchen_core.training.data.shard_index import ShardSource, are_indexed


@pytest.fixture
def index(tmp_path):
    return tmp_path / "index"


def seen(batches):
    return Counter(caption for batch in batches for caption in batch["caption"])


EPOCH = Counter(f"picture {number}" for number in range(18))


def test_samples_are_those_of_the_stream(shards, index):
    options = {"size": 192, "batch": 1}
    ours = {batch["key"][0]: batch for batch in take(18, shards, index=index, **options)}
    theirs = {batch["key"][0]: batch for batch in take(18, shards, **options)}
    assert ours.keys() == theirs.keys() and all_same([ours[key] for key in theirs], list(theirs.values()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_only_what_is_still_to_come(shards, index, workers, monkeypatch):
    whole = take(12, shards, 192, 3, index=index)
    read, opened = 0, shard_index._read

    def counted(file, span):
        nonlocal read
        read += span.length
        return opened(file, span)

    monkeypatch.setattr(shard_index, "_read", counted)
    rest = take(2, shards, 192, 3, index=index, first=10, workers=workers)
    assert all_same(rest, whole[10:])
    pictures = sum(len(encoded(picture(number, (64, 64)))) for number in range(6))
    assert workers or 0 < read < 2 * pictures  # six of them, and not the ninety before


def test_one_process_then_two_then_one_see_each_sample_once_an_epoch(shards, index):
    """Killed and resumed twice within two epochs, with other numbers of workers too."""
    had, given = [], []
    for world, workers, steps in ((1, 0, 5), (2, 1, 4), (1, 2, 6), (3, 0, 1)):
        parts = [
            take(steps, shards, 64, 2, buckets=False, index=index, first=had, rank=rank, world=world, workers=workers)
            for rank in range(world)
        ]
        given += [batch for step in zip(*parts, strict=True) for batch in step]
        had = [*had, (steps, 2 * world)]
    captions = [caption for batch in given for caption in batch["caption"]]
    assert len(captions) == 5 * 2 + 4 * 4 + 6 * 2 + 6 == 44
    assert Counter(captions[:18]) == Counter(captions[18:36]) == EPOCH
    assert not Counter(captions[36:]) - EPOCH


def test_with_buckets_too_nothing_is_lost_or_seen_twice_when_batches_shrink(shards, index):
    def order(*had, count=0):
        batches = open_batches(shards, 192, 1, index=index, first=list(had))
        return [batch["key"][0] for batch in islice(batches, count)]

    alone = order(count=90)
    resumed = take(4, shards, 192, 4, index=index)
    after = order((4, 4), count=60)
    together = Counter(key for batch in resumed for key in batch["key"]) + Counter(after)
    assert set(together) == set(alone)
    assert min(together.values()) >= 76 // 18 - 1 and max(together.values()) <= 76 // 18 + 2


def test_the_index_is_kept_and_made_anew_where_a_shard_or_itself_has_changed(shards, index, tmp_path, monkeypatch):
    scanned = []
    scan = shard_index.scan
    monkeypatch.setattr(
        shard_index, "scan", lambda url, stamp: scanned.append(os.path.basename(url)) or scan(url, stamp)
    )
    urls = [str(tmp_path / f"{number}.tar") for number in range(3)]
    assert len(ShardSource(urls, index)) == 18 and sorted(scanned) == ["0.tar", "1.tar", "2.tar"]
    scanned.clear()
    assert len(ShardSource(urls, index, rank=1, world=2)) == 18 and not scanned
    write_shard(tmp_path / "1.tar", samples_of(range(30, 33)))
    source = ShardSource(urls, index)
    assert scanned == ["1.tar"] and len(source) == 15
    assert source.caption(5) == "picture 30" and source.key(5).endswith("1.tar/30")
    scanned.clear()
    os.utime(tmp_path / "2.tar", (0, 0))
    ShardSource(urls, index)
    assert scanned == ["2.tar"]
    scanned.clear()
    empty, other, cut = sorted(index.iterdir())
    empty.write_bytes(b"")
    other.write_bytes(b"no archive")
    os.truncate(cut, cut.stat().st_size // 2)
    assert len(ShardSource(urls, index)) == 15 and sorted(scanned) == ["0.tar", "1.tar", "2.tar"]
    assert not list(index.glob(".*"))


def test_what_can_not_be_used_is_told_and_the_rest_is(shards, index, tmp_path, caplog):
    png = encoded(picture(0))
    files = [("a.png", png), ("a.txt", b"a"), ("b.png", b"no picture"), ("c.txt", b"c"), ("d.png", png)]
    write_shard(tmp_path / "3.tar", files)
    cut = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "4.tar").write_bytes(cut[: cut.index(b"12.png")])
    urls = [str(tmp_path / name) for name in ("3.tar", "4.tar", "missing.tar")]
    batches = take(3, urls, 64, 1, buckets=False, index=index)
    assert seen(batches) == Counter(["a", "", "picture 11"])
    for part in (
        "3.tar/b: cannot identify",
        "3.tar/c: there is no picture",
        "4.tar.*cut short",
        "missing.tar.*No such",
    ):
        assert sum(bool(re.search(part, message)) for message in caplog.messages) == 1, part
    with pytest.raises(WuerstchenError, match="no shard holds a sample to learn from: no sample can be read"):
        take(1, str(tmp_path / "missing.tar"), 64, 1, index=index)


def test_only_plain_shards_on_a_disk_are_indexed(shards, tmp_path):
    (tmp_path / "packed.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    plain = str(tmp_path / "0.tar")
    assert are_indexed([plain, f"file://{plain}", str(tmp_path / "missing.tar")])
    for url in (f"pipe:cat {plain}", "s3://bucket/0.tar", str(tmp_path / "packed.tar"), str(tmp_path / "0.tar.gz")):
        assert not are_indexed([plain, url])


RECORDS = {
    "good": {"original_width": 1200, "original_height": 1024, "aesthetic": 5.5, "pwatermark": 0.1, "punsafe": 0.0},
    "low": {"original_width": 1200, "original_height": 900, "AESTHETIC_SCORE": 5.5, "pwatermark": 0.1, "punsafe": 0.0},
    "ugly": {"width": 1200, "height": 1100, "aesthetic": 4.5, "pwatermark": 0.1, "punsafe": 0.0},
    "marked": {"width": 1200, "height": 1100, "aesthetic": 6, "pwatermark": 0.6, "punsafe": 0.0},
    "unsafe": {"width": 1200, "height": 1100, "aesthetic": 6, "pwatermark": 0.1, "punsafe": 1.0},
    "unknown": {"aesthetic": None, "pwatermark": "low"},
}


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(
    "bounds, kept",
    [
        ({"min_side": 1024}, {"good", "ugly", "marked", "unsafe"}),
        ({"min_aesthetic": 5.0}, {"good", "low", "marked", "unsafe"}),
        ({"max_watermark": 0.5}, {"good", "low", "ugly", "unsafe"}),
        ({"max_unsafe": 0.99}, {"good", "low", "ugly", "marked"}),
        ({"min_side": 64}, set(RECORDS)),  # the picture's own, where the JSON names none
        ({"min_side": 1024, "min_aesthetic": 5.0, "max_watermark": 0.5, "max_unsafe": 0.99}, {"good"}),
    ],
)
def test_filters_read_what_the_json_says_and_take_what_is_missing_for_bad(tmp_path, index, indexed, bounds, kept):
    files = [
        file
        for name, record in RECORDS.items()
        for file in ((f"{name}.png", encoded(picture(0))), (f"{name}.txt", name.encode()), (f"{name}.json", record))
    ]
    files = [(name, json.dumps(content).encode() if isinstance(content, dict) else content) for name, content in files]
    shard = write_shard(tmp_path / "x.tar", files)
    batches = take(12, shard, 64, 1, filters=Filters(**bounds), index=index if indexed else None)
    assert set(seen(batches)) == kept


def test_filters_that_leave_nothing_or_have_nothing_to_read_are_told(shards, folder, index):
    filters = Filters(min_aesthetic=5.0)
    with pytest.raises(WuerstchenError, match="the filters leave out all of 18 samples"):
        open_batches(shards, 64, 1, filters=filters, index=index)
    with pytest.raises(WuerstchenError, match="no shard holds a sample that can be read and passes the filters"):
        take(1, shards, 64, 1, filters=filters)
    with pytest.raises(WuerstchenError, match="max_watermark and max_unsafe are read from shards"):
        open_batches(folder, 64, 1, filters=filters)
    assert np.isnan(scores(b"[1]", (3, 4))[1:]).all() and scores(b"\xff", (3, 4))[0] == 3


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_held_out_pictures_are_never_learned_from(kind, request, index):
    data = request.getfixturevalue(kind)
    total = 23 if kind == "folder" else 18
    held = seen(open_batches(data, 64, 3, index=index, held_out=5, validation=True))
    assert len(held) == 5 and set(held.values()) == {1}
    learned = seen(take(2 * (total - 5), data, 64, 1, buckets=False, index=index, held_out=5))
    assert set(learned.values()) == {2} and len(learned) == total - 5 and not learned.keys() & held.keys()
    with pytest.raises(WuerstchenError, match=f"held_out is {total}: there are only {total} pictures"):
        open_batches(data, 64, 1, index=index, held_out=total)


def test_streams_hold_nothing_out(shards):
    with pytest.raises(WuerstchenError, match="held_out needs a folder, or .tar files on a disk"):
        open_batches(f"pipe:cat {shards}", 64, 1, held_out=2)
