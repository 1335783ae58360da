"""One run to a folder: the lock, and what ends a run from outside."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

import wuerstchen_core as w
from tests.training.runs import hang_while_saving, launcher, process, run_toy, wait_for
from wuerstchen_core.training.loop.interrupts import Interrupts
from wuerstchen_core.training.loop.lock import locked


def test_a_second_run_is_refused_and_leaves_the_first_ones_files(tmp_path):
    saving = process(hang_while_saving, tmp_path, 2)
    wait_for((tmp_path / "hangs").exists)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert any(path.name.endswith(".partial") for path in before)
    with pytest.raises(w.WuerstchenError, match=f"another run is using it .process {saving.pid} on") as told:
        run_toy(tmp_path)
    assert socket.gethostname() in str(told.value) and "train in another folder" in str(told.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    saving.kill()
    saving.join()
    run_toy(tmp_path, steps=7)
    assert not list(tmp_path.glob(".*"))


def test_a_process_keeps_itself_out_too_and_a_lock_that_was_left_does_not_matter(tmp_path):
    (tmp_path / "run.lock").write_text("process 1 on nowhere")
    with locked(tmp_path):
        with pytest.raises(w.WuerstchenError, match=f"process {os.getpid()} on"), locked(tmp_path):
            pass
        with pytest.raises(w.WuerstchenError, match="another run is using it"):
            run_toy(tmp_path)
    with locked(tmp_path):
        pass


def test_loaders_of_a_killed_run_do_not_keep_its_lock(tmp_path):
    """A forked loader outlives the run by some seconds."""
    read, write = os.pipe()
    run = os.fork()
    if not run:
        with locked(tmp_path):
            loader = os.fork()
            if loader:
                os.write(write, str(loader).encode())
            time.sleep(60)
            os._exit(0)
    loader = int(os.read(read, 20))
    try:
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        with locked(tmp_path):
            os.kill(loader, 0)  # is still there
    finally:
        os.kill(loader, signal.SIGKILL)
        os.close(read), os.close(write)


def test_the_lock_follows_no_link_and_names_what_can_not_be_written(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(w.WuerstchenError, match="run.lock: could not be written"):
        run_toy(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_end_of_the_launcher_stops_its_processes_and_saves(tmp_path):
    started = process(launcher, tmp_path)
    wait_for((tmp_path / "checkpoint.pt").exists)
    rank = int((tmp_path / "pid").read_text())
    started.kill()
    started.join()
    wait_for(lambda: (tmp_path / "told").exists(), 30)
    told = (tmp_path / "told").read_text()
    assert told.startswith("KeyboardInterrupt: stopped after step") and "the same command goes on" in told
    wait_for(lambda: not Path(f"/proc/{rank}/status").exists() or "zombie" in Path(f"/proc/{rank}/status").read_text())
    run_toy(tmp_path, steps=1)  # is not refused


def test_one_process_may_lose_its_parent():
    assert not Interrupts().asked and not Interrupts(launched=True).asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_told_in_a_line_of_its_own(tmp_path, capfd, number):
    with Interrupts() as interrupts:
        os.kill(os.getpid(), number)
        assert interrupts.asked
    assert capfd.readouterr().err == "\nstopping after this step, and saving; once more to end at once\n"
