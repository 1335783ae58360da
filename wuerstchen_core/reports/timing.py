"""How long sampling takes, several ways in turn, and how fast a device multiplies matrices."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch

Run = Callable[[int, Callable[[], None]], object]  # (steps, done): so many steps; done() is called after each


@dataclass(frozen=True)
class Timing:
    """Of a run: `total` seconds for `steps` steps, of which each takes `step`."""

    total: float
    step: float
    steps: int

    def seconds(self, steps: int) -> float:
        """Of a run of so many steps: measured if it is the number that was timed, else extrapolated."""
        return self.total + (steps - self.steps) * self.step


@dataclass
class _Clock:
    """Seconds of the runs and steps of one side."""

    totals: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def time(self, run: Run, steps: int, device) -> None:
        ends: list[float] = []
        start = now(device)
        run(steps, lambda: ends.append(now(device)))
        self.totals.append(now(device) - start)
        self.steps += [after - before for before, after in pairwise(ends)] or [self.totals[-1]]


def time_in_turn(runs: Mapping[str, Run], steps: Mapping[str, int], rounds: int, device="cpu") -> dict[str, Timing]:
    """The median of each side's runs and steps, `rounds` runs of each, one after the other.

    A step is the time from the end of one to the end of the next; what comes before the first counts in the total only.
    A run of one step is that step.
    """
    clocks = {side: _Clock() for side in runs}
    for _ in range(rounds):
        for side, run in runs.items():
            clocks[side].time(run, steps[side], device)
    return {
        side: Timing(statistics.median(clock.totals), statistics.median(clock.steps), steps[side])
        for side, clock in clocks.items()
    }


def now(device) -> float:
    """The time in seconds, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(dtype: torch.dtype, device="cpu", tries: int = 5) -> float:
    """Operations a second of the fastest of several products of square matrices (GEMM) in this precision."""
    side = 8192 if torch.device(device).type == "cuda" else 1024
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    product = torch.mm(left, right)  # the first sets up what the library keeps
    fastest = float("inf")
    for _ in range(tries):
        start = now(device)
        torch.mm(left, right, out=product)
        fastest = min(fastest, now(device) - start)
    return 2 * side**3 / fastest
