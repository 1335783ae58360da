"""Runs of two processes, one of which is killed or stopped, and runs that go on with another number of them."""

import os
import signal
from collections import Counter

import pytest
import torch

from tests.training.data.samples import samples_of, write_shard
from tests.training.runs import count_pictures, free_port, process, run_one_of_two, run_toy, wait_for


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture
def two(tmp_path):
    """Two processes at work that have saved twice."""
    port = free_port()
    ranks = [process(run_one_of_two, tmp_path, rank, port) for rank in range(2)]
    wait_for((tmp_path / "checkpoint-before.pt").exists)
    yield ranks
    for rank in ranks:
        rank.kill()


@pytest.mark.parametrize("killed", [0, 1])
def test_if_one_process_is_killed_the_other_ends_and_says_how_to_go_on(two, tmp_path, killed):
    two[killed].kill()
    wait_for((tmp_path / f"told{1 - killed}").exists, 30)
    told = (tmp_path / f"told{1 - killed}").read_text()
    assert told.startswith("WuerstchenError: another process of this run has ended, or can't be reached (")
    saved = checkpoint(tmp_path)["step"]
    known = [saved, saved - 5]  # the main process may be killed before it has told of the last one
    assert any(f"checkpoint.pt, of step {step}: once all" in told for step in known)
    assert told.endswith("the same command goes on from there")
    assert len(told) < 500 and "\n" not in told and saved % 5 == 0
    two[1 - killed].join(timeout=30)
    run_toy(tmp_path, steps=saved + 1)
    assert checkpoint(tmp_path)["step"] == saved + 1


def test_if_one_process_is_interrupted_both_save_the_same_step(two, tmp_path):
    os.kill(two[1].pid, signal.SIGINT)
    wait_for(lambda: all((tmp_path / f"told{rank}").exists() for rank in range(2)), 30)
    saved = checkpoint(tmp_path)["step"]
    for rank in range(2):
        told = (tmp_path / f"told{rank}").read_text()
        assert told.startswith(f"KeyboardInterrupt: stopped after step {saved}, ") and "the same command" in told


def test_killed_and_resumed_by_one_two_and_one_process_a_run_sees_each_picture_once_an_epoch(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", samples_of(range(6 * number, 6 * number + 6)))
    shards, folder = str(tmp_path / "{0..2}.tar"), tmp_path / "run"

    def saved():
        return checkpoint(folder)["step"] if (folder / "checkpoint.pt").exists() else 0

    for part, world in enumerate((1, 2)):
        before, port = saved(), free_port() if world == 2 else None
        ranks = [
            process(count_pictures, folder, shards, tmp_path / f"{part}-{rank}", 1000, rank, port)
            for rank in range(world)
        ]
        wait_for(lambda before=before: saved() >= before + 6)
        for rank in ranks:
            rank.kill()
            rank.join()
    end = saved() + 9
    count_pictures(folder, shards, tmp_path / "2-0", end)

    learned = {}  # step -> the names, by the last run that took this step
    for part in range(3):
        own = {}
        for notes in tmp_path.glob(f"{part}-*"):
            for line in notes.read_text().splitlines():
                step, *names = line.split()
                own.setdefault(int(step), []).extend(names)
        first = min(own)
        learned = {step: names for step, names in learned.items() if step < first} | own
    seen = Counter(name for names in learned.values() for name in names)
    history = checkpoint(folder)["seen"]
    assert [pictures for _, pictures in history] == [2, 4, 2]
    assert sorted(learned) == list(range(end)) and len(seen) == 18
    assert sum(seen.values()) == sum(count * pictures for count, pictures in history) > 36
    assert max(seen.values()) - min(seen.values()) <= 1
