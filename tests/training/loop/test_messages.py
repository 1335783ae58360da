"""What a run says when it can't go on, and what it leaves."""

import builtins
import logging
import os
import shutil
import signal
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import wuerstchen_core as w
from tests.training.runs import PLAN, Toy, run_toy, toy_batches
from wuerstchen_core.training.loop import monitor, run
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.loop.run import train
from wuerstchen_core.training.loop.state import RunState


def refused(folder, task=None, batches=None, **changes):
    """What the error says, on one line."""
    with pytest.raises(w.WuerstchenError) as told:
        train(task or Toy(), Plan(**{**PLAN, **changes}), folder, batches or toy_batches())
    assert "\n" not in str(told.value) and len(str(told.value)) < 500
    return str(told.value)


def step_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["step"]


class Numbers(torch.utils.data.IterableDataset):
    """The toy's batches, whose loader's process is killed while it loads the ninth."""

    def __iter__(self):
        for number, batch in enumerate(toy_batches()([], 0, 1)):
            if number == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def test_a_killed_loader_is_told_and_what_was_learned_is_saved(tmp_path):
    def batches(first, rank, world):
        yield from DataLoader(Numbers(), batch_size=None, num_workers=1, prefetch_factor=1)

    before = signal.getsignal(signal.SIGCHLD)
    told = refused(tmp_path, batches=batches, save_every=100)
    saved = step_of(tmp_path)
    assert 6 <= saved <= 8 and f"of step {saved}, and the same command goes on from there" in told
    assert "a process that loads data has ended (DataLoader worker" in told and "fewer --workers" in told
    whole = tmp_path / "whole"
    run_toy(whole, steps=saved)
    ours, theirs = (torch.load(folder / "checkpoint.pt")["weights"] for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    signal.signal(signal.SIGCHLD, before)


def test_a_loader_that_dies_within_a_step_does_not_end_it(tmp_path):
    """torch's handler would raise there."""

    class Killing(Toy):
        def forward(self, batch, draws):
            if draws.step == 3:
                os.kill(os.getpid(), signal.SIGCHLD)
            return super().forward(batch, draws)

    def raises(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def batches(first, rank, world):
        signal.signal(signal.SIGCHLD, raises)  # as a DataLoader does
        yield from toy_batches()(first, rank, world)

    before = signal.getsignal(signal.SIGCHLD)
    try:
        train(Killing(), Plan(**{**PLAN, "steps": 6}), tmp_path, batches)
        assert signal.getsignal(signal.SIGCHLD) is raises
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert step_of(tmp_path) == 6


@pytest.mark.parametrize("save_every", [1, 9])
def test_a_folder_that_is_removed_is_told_without_tracebacks(tmp_path, save_every, capfd):
    folder = tmp_path / "run"

    class Removing(Toy):
        def forward(self, batch, draws):
            if draws.step == 7:
                shutil.rmtree(folder)
            return super().forward(batch, draws)

    told = refused(folder, Removing(), save_every=save_every)
    assert "could not be written (No such file or directory)" in told
    assert "intact" not in told and ("removed?" in told or "no checkpoint yet" in told)
    assert "Traceback" not in capfd.readouterr().err


def test_no_space_is_told_when_torch_does_not_say_so(tmp_path, monkeypatch):
    def save(state, path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    opened = builtins.open

    def full(path, mode="r", *rest, **options):
        if mode == "ab":
            raise OSError(28, "No space left on device", str(path))
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(builtins, "open", full)
    assert "checkpoint.pt: could not be written (No space left on device)" in refused(tmp_path)


def test_a_warning_is_not_glued_to_the_progress_bar(tmp_path, capfd, monkeypatch):
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])

    def batches(first, rank, world):
        for number, batch in enumerate(toy_batches()(first, rank, world)):
            if number == 5:
                logging.getLogger("wuerstchen_core.data").warning("skipped a.png: cannot identify image file")
            yield batch

    train(Toy(), Plan(**{**PLAN, "steps": 8}), tmp_path, batches)
    told = capfd.readouterr().err
    assert "\nskipped a.png" in told.replace("\r", "\n") and "it/s]skipped" not in told
    assert logging.getLogger().handlers == [handler]


def test_a_run_that_is_done_tells_how_many_steps_it_has(tmp_path, capsys):
    run_toy(tmp_path, steps=6)
    run_toy(tmp_path, steps=4)
    assert "all of its 6 steps are done" in capsys.readouterr().out


def test_memory_that_gives_out_is_told(tmp_path):
    class Large(Toy):
        def forward(self, batch, draws):
            if draws.step == 7:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\n" + "x" * 1000)
            return super().forward(batch, draws)

    told = refused(tmp_path, Large())
    assert "out of memory (CUDA out of memory" in told and "smaller --batch" in told and "of step 6" in told


def test_another_process_that_is_lost_is_told_and_other_errors_stay_as_they_are(tmp_path):
    lost = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:51")
    state = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2), remains=lambda: "the last is of step 6")
    told = str(run._explained(lost, state))
    assert (
        "another process of this run has ended" in told and "of step 6" in told and "the same command goes on" in told
    )
    assert run._explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), state) is None
    state.accelerator.num_processes = 1
    assert run._explained(lost, state) is None


@pytest.mark.parametrize("package", ["accelerate", "torch.utils.tensorboard"])
def test_a_package_that_is_there_and_broken_gives_its_own_reason(tmp_path, monkeypatch, package):
    imported = builtins.__import__

    def broken(name, *rest):
        if name == package:
            raise ImportError("cannot import name 'Tensor2' from 'torch'")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(w.WuerstchenError, match="can't be imported .cannot import name 'Tensor2' from 'torch'.: pip"):
        if package == "accelerate":
            run.accelerator_for(Plan(steps=1), Toy())
        else:
            monitor.Monitor(tmp_path, 0, 1, True).__enter__()


@pytest.mark.parametrize("device, processes, synchronised", [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)])
def test_batch_norms_see_all_processes_batches_on_gpus(tmp_path, device, processes, synchronised):
    """The wrapping itself needs no GPU."""
    task = Toy()
    names = list(task.learned())
    Accelerator = namedtuple("Accelerator", "num_processes device prepare scaler state")
    accelerator = Accelerator(processes, torch.device(device), lambda *them: them, None, None)
    state = RunState(task, Plan(steps=1), tmp_path, accelerator, dict)
    model, _ = state.prepare()
    assert isinstance(model.network[1], nn.SyncBatchNorm) == synchronised
    assert list(task.learned()) == names


def test_shards_of_weights_that_the_cpu_cannot_have_are_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    train(Toy(), Plan(**PLAN), tmp_path, toy_batches())
    assert "shards nothing on the CPU" in caplog.text
