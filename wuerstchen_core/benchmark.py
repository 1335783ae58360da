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
        seconds = _time_picture(model, seed=run)
        stages = ", ".join(f"{stage} {took:.2f} s" for stage, took in seconds.items())
        yield f"picture {run} {sum(seconds.values()):6.2f} s: {stages}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield f"peak memory {peak:.2f} GiB, {torch.get_num_threads()} threads"


def _time_picture(model: Wuerstchen, seed: int) -> dict[str, float]:
    """Seconds of each stage: text is in Stage C's, the time until the picture is there in Stage A's."""
    seconds = {"Stage C": 0.0, "Stage B": 0.0, "Stage A": 0.0}
    last = time.perf_counter()

    def clock(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage] += now - last
        last = now

    model.generate("a slice of pizza", seed=seed, progress=lambda stage, step, steps: clock(stage))
    clock("Stage A")
    return seconds
