"""Which of two sets of pictures on the same prompts is preferred: by PickScore (paper, table 1)."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from ...util.errors import WuerstchenError, readable
from .reading import Scored

RESAMPLES = 10_000
CONFIDENCE = 0.95


class WinRate(NamedTuple):
    """The share of wins, a tie counting half, and the ends of its bootstrap interval of 95 %."""

    rate: float
    low: float
    high: float


def win_rate(wins: int, ties: int, losses: int) -> WinRate:
    """The win rate and its percentile bootstrap interval; the same each time.

    Of a set of wins, ties and losses, a resample has multinomial numbers of each.

    Raises WuerstchenError if there are none of all three.
    """
    count = wins + ties + losses
    if not count:
        raise WuerstchenError("there is nothing to compare: no wins, ties or losses")
    drawn = np.random.default_rng(0).multinomial(count, np.array([wins, ties, losses]) / count, RESAMPLES)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile((drawn[:, 0] + drawn[:, 1] / 2) / count, [tail, 100 - tail])
    return WinRate((wins + ties / 2) / count, float(low), float(high))


def counted(ours: Tensor, theirs: Tensor) -> tuple[int, int, int]:
    """Scores (N,) of two sets on the same prompts -> wins, ties and losses of the first one."""
    return int((ours > theirs).sum()), int((ours == theirs).sum()), int((ours < theirs).sum())


def paired(a: Scored, b: Scored, names: tuple[str, str]) -> list[int]:
    """For each picture of `a`, the index of the one of the same name in `b`.

    Raises WuerstchenError if the sets have different names or captions, or a name twice.
    """
    for found, name in ((a, names[0]), (b, names[1])):
        if len(set(found.keys)) < len(found.keys):
            twice = next(key for key in found.keys if found.keys.count(key) > 1)
            raise WuerstchenError(f"{readable(name, 150)}: two pictures are called {readable(twice, 100)}")
    places = {key: i for i, key in enumerate(b.keys)}
    alone = sorted(set(a.keys) ^ set(b.keys))
    if alone:
        missing = names[1] if alone[0] in a.keys else names[0]
        raise WuerstchenError(
            f"{readable(missing, 150)}: {readable(alone[0], 100)} is missing or can't be read; pictures of the two "
            f"sets are compared by name ({len(alone)} have no counterpart)"
        )
    order = [places[key] for key in a.keys]
    for i, j in enumerate(order):
        if a.captions[i] != b.captions[j]:
            raise WuerstchenError(
                f"{readable(a.keys[i], 100)}: the captions differ, {readable(a.captions[i], 80)!r} and "
                f"{readable(b.captions[j], 80)!r}; the two sets must have the same prompts, or give --prompts FILE"
            )
    return order
