"""How long a model takes to load and to draw, and the memory that it needs."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from ..checkpoints.archive import open_archive
from ..checkpoints.describe import describe
from ..checkpoints.load import load_network, parts
from ..pipeline import MAX_BATCH, Wuerstchen
from ..util.checks import whole_number
from .memory import peak, peak_growth

MAX_RUNS = 1_000_000


def benchmark(load: Callable[[], Wuerstchen], runs: int) -> Iterator[str]:
    """Loads a model, draws `runs` pictures of 256x256 at the default steps; one line per figure.

    Raises:
        WuerstchenError: there is nothing to measure, `runs` being below 1.
    """
    whole_number("--runs", runs, 1, MAX_RUNS)
    start = time.perf_counter()
    model = load()
    yield f"load      {time.perf_counter() - start:6.2f} s"
    for run in range(1, runs + 1):
        seconds = _time_picture(model, seed=run)
        stages = ", ".join(f"{stage} {took:.2f} s" for stage, took in seconds.items())
        yield f"picture {run} {sum(seconds.values()):6.2f} s: {stages}"
    threads = f"{torch.get_num_threads()} threads"
    most = peak()
    yield threads if most is None else f"peak memory {most / 2**30:.2f} GiB, {threads}"


def benchmark_batches(load: Callable[[], Wuerstchen], batches: Sequence[int], runs: int) -> Iterator[str]:
    """Draws so many pictures at once at the default steps, each number `runs` times, in turn; a line for each number.

    Raises:
        WuerstchenError: a number, or `runs`, is not possible.
    """
    whole_number("--runs", runs, 1, MAX_RUNS)
    for batch in batches:
        whole_number("--batch", batch, 1, MAX_BATCH)
    model = load()
    _time_picture(model, seed=0)  # the first one sets up what the libraries keep
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    for run in range(1, runs + 1):
        for batch, took in seconds.items():
            took.append(sum(_time_picture(model, seed=run, batch_size=batch).values()))
    medians = {batch: statistics.median(took) for batch, took in seconds.items()}
    first = next(iter(medians)) / next(iter(medians.values()))
    for batch, median in medians.items():
        rate = batch / median
        yield f"batch {batch:4} {median:7.2f} s, {rate:6.2f} pictures a second, {rate / first:.2f} times"
    yield f"{torch.get_num_threads()} threads"


def benchmark_loading(path: Path, device="cpu") -> Iterator[str]:
    """Loads the networks of a file one by one, in the file's own precision; a line a network.

    The peak of memory is that of the process above what it had before, also as a multiple of the file's size.

    Raises:
        WuerstchenError: it is not a file that the loaders take, or this is not Linux.
    """
    list(describe(path))  # imports what the networks are made of
    archive = open_archive(path)
    kinds, size = list(parts(archive)), archive.size
    del archive
    for kind in kinds:
        start = time.perf_counter()
        growth, network = peak_growth(partial(load_network, kind, path, device, dtype=None))
        seconds = time.perf_counter() - start
        yield (
            f"{path}: {kind} in {seconds:.2f} s, {size / 1e6:,.1f} MB, peak memory {growth / 1e6:,.1f} MB "
            f"({growth / size:.2f} of the file)"
        )
        del network


def _time_picture(model: Wuerstchen, seed: int, batch_size: int = 1) -> dict[str, float]:
    """Seconds of each stage: text is in Stage C's, the time until the picture is there in Stage A's."""
    seconds = {"Stage C": 0.0, "Stage B": 0.0, "Stage A": 0.0}
    last = time.perf_counter()

    def clock(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage] += now - last
        last = now

    model.generate(
        "a slice of pizza", seed=seed, batch_size=batch_size, progress=lambda stage, step, steps: clock(stage)
    )
    clock("Stage A")
    return seconds
