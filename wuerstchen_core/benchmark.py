"""How long a model takes to load and to draw, and the memory that it needs."""

import resource
import time
from collections.abc import Callable, Iterator

import torch

from .pipeline import Wuerstchen


def benchmark(load: Callable[[], Wuerstchen], runs: int) -> Iterator[str]:
    """Loads a model, draws `runs` pictures of 256x256 at the default steps; a line a figure."""
    start = time.perf_counter()
    model = load()
    yield f"load      {time.perf_counter() - start:6.2f} s"
    for run in range(1, runs + 1):
        last = start = time.perf_counter()
        took: dict[str, float] = {}

        def clock(stage: str, step: int, steps: int) -> None:
            nonlocal last
            now = time.perf_counter()
            took[stage] = took.get(stage, 0.0) + now - last
            last = now

        model.generate("a slice of pizza", seed=run, progress=clock)
        total = time.perf_counter() - start
        stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in took.items())
        yield f"picture {run} {total:6.2f} s: {stages}, Stage A {total - sum(took.values()):.2f} s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield f"peak memory {peak:.2f} GiB, {torch.get_num_threads()} threads"
