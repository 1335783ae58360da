"""A run that goes on with other data, or in another way, says so."""

import dataclasses
import os

import pytest

from tests.training.runs import PLAN, Toy, toy_batches
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.loop import record
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.loop.record import facts, tell_changes
from wuerstchen_core.training.loop.run import train

OTHERS = "no longer exactly those that it would have had"
RESIZED = "another size, and each sample is still seen once an epoch"
SAME = "still those that it would have had"


@pytest.fixture
def data(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / name).with_suffix(".txt").write_text(f"picture {name}")
    return DataOptions(data=str(tmp_path))


CHANGES = {
    "added": lambda folder: (folder / "d.png").write_bytes(b"d"),
    "removed": lambda folder: (folder / "a.png").unlink(),
    "renamed": lambda folder: (folder / "a.png").rename(folder / "e.png"),
    "exchanged": lambda folder: (folder / "a.png").write_bytes(b"another"),
    "caption changed": lambda folder: (folder / "a.txt").write_text("picture b.png"),
    "caption removed": lambda folder: (folder / "sub" / "c.txt").unlink(),
    "caption damaged": lambda folder: (folder / "a.txt").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_data_is_seen(data, tmp_path, change):
    before = facts(data)
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))  # a copy on another disk is not a change
    assert facts(data) == before and before["data"].startswith("3 pictures, ")
    CHANGES[change](tmp_path)
    assert facts(data)["data"] != before["data"]


def test_shards_are_told_apart_by_names_and_sizes_and_the_workers_of_streams_count(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(bytes(1024))
    data = DataOptions(data=str(tmp_path / "{0,1}.tar"), workers=0)
    before = facts(data)
    assert before["data"].startswith("2 shards, ") and "workers" not in before
    (tmp_path / "1.tar").write_bytes(bytes(2048))
    assert facts(data)["data"] != before["data"]
    assert facts(dataclasses.replace(data, min_aesthetic=5.0))["filters"] != before["filters"]
    stream = dataclasses.replace(data, data=f"pipe:cat {tmp_path}/0.tar")
    assert facts(stream)["workers"] == 1 and facts(dataclasses.replace(stream, workers=3))["workers"] == 3


@pytest.mark.parametrize(
    "before, now, told",
    [
        ({"seed": 0}, {"seed": 1}, ["seed (0, now 1)", OTHERS]),
        (
            {"batch": 4, "processes": 2},
            {"batch": 8, "processes": 1},
            ["batch (4, now 8)", SAME],
        ),
        ({"batch": 4, "processes": 2}, {"batch": 4, "processes": 1}, ["processes (2, now 1)", RESIZED]),
        ({"batch": 4, "processes": 1}, {"batch": 2, "processes": 1}, ["batch (4, now 2)", RESIZED]),
        (
            {"batch": 4, "processes": 2, "workers": 1},
            {"batch": 8, "processes": 1, "workers": 1},
            ["batch (4, now 8)", OTHERS],
        ),
        ({}, {"data": "3 pictures"}, ["data (unknown, now 3 pictures)", OTHERS]),
    ],
)
def test_what_changed_is_named_and_whether_the_batches_did(tmp_path, caplog, before, now, told):
    tell_changes(tmp_path, 6, now, now)
    assert not caplog.records
    tell_changes(tmp_path, 6, before, now)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "since its checkpoint of step 6" in said and all(part in said for part in told)


def test_a_resumed_run_tells_of_changes_and_an_unchanged_one_is_silent(tmp_path, caplog):
    def learn(steps, facts, **changes):
        train(Toy(), Plan(**{**PLAN, "steps": steps, **changes}), tmp_path, toy_batches(), facts=lambda: facts)
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return said

    assert learn(6, {"data": "3 pictures", "batch": 4}) == []
    assert learn(7, {"data": "3 pictures", "batch": 4}) == []
    (said,) = learn(8, {"data": "4 pictures", "batch": 2}, seed=1, accumulate=2)
    for part in ("data (3 pictures, now 4 pictures)", "batch (4, now 2)", "seed (0, now 1)", "accumulate (1, now 2)"):
        assert part in said
    assert learn(9, {"data": "4 pictures", "batch": 2}, seed=1, accumulate=2) == []


def test_of_many_pictures_all_names_and_some_captions_are_read(data, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "LOOKED_AT", 1)
    before = facts(data)
    (tmp_path / "b.txt").write_text("not looked at")
    assert facts(data) == before
    (tmp_path / "b.png").rename(tmp_path / "f.png")
    assert facts(data) != before
