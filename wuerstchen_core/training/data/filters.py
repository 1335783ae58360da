"""Which samples of shards are learned from, by what the JSON beside a picture says of it.

The names of the scores are those of LAION's data sets, on which Würstchen was trained, and of COYO's.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SIDES = (("original_width", "width"), ("original_height", "height"))
AESTHETIC = ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score", "aesthetic_score_laion_v2")
WATERMARK = ("pwatermark", "watermark_score")
UNSAFE = ("punsafe",)

Scores = (
    np.ndarray
)  # (..., 4): shorter side in pixels, aesthetic score, probabilities of a watermark and of being unsafe


@dataclass(frozen=True)
class Filters:
    """Bounds on a sample's scores; the defaults keep everything. A score that is missing is taken for the worst one."""

    min_side: int = 0
    min_aesthetic: float = 0.0
    max_watermark: float = 1.0
    max_unsafe: float = 1.0

    @property
    def are_set(self) -> bool:
        return self != KEEP_ALL

    def keep(self, scores: Scores) -> Any:
        """Whether samples pass: scores (..., 4) -> booleans (...)."""
        side, aesthetic, watermark, unsafe = np.moveaxis(np.nan_to_num(scores, nan=-1.0), -1, 0)
        watermark, unsafe = (np.where(chance < 0, 1.0, chance) for chance in (watermark, unsafe))
        return (
            (side >= self.min_side)
            & (np.maximum(aesthetic, 0) >= self.min_aesthetic)
            & (watermark <= self.max_watermark)
            & (unsafe <= self.max_unsafe)
        )


KEEP_ALL = Filters()


def scores(content: bytes | None, size: tuple[int, int]) -> Scores:
    """The scores (4,) in a sample's JSON, NaN where it has none; `size` is the picture's own, used if it names none."""
    record = _record(content)
    sides = [_number(record, names) for names in SIDES]
    shorter = min(size) if any(map(math.isnan, sides)) else min(sides)
    return np.array([shorter, *(_number(record, names) for names in (AESTHETIC, WATERMARK, UNSAFE))], np.float32)


def _record(content: bytes | None) -> Mapping[str, Any]:
    try:
        record = json.loads(content.decode("utf-8-sig")) if content else {}
    except (ValueError, RecursionError):  # a bad sample: it is found, and reported, when it is loaded
        return {}
    return record if isinstance(record, dict) else {}


def _number(record: Mapping[str, Any], names: tuple[str, ...]) -> float:
    values = (record.get(name) for name in names)
    return next((float(value) for value in values if isinstance(value, (int, float))), math.nan)
