"""Which pictures are drawn together, and by whom.

The last bits of a picture depend on the batch that it is drawn in, since matrix products of other sizes are summed in
another order. So batches follow from the file alone: they are made within blocks of consecutive lines, of what has the
same sizes and settings, whatever is there already and whoever draws them.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..models.stage_b import StageBConfig
from ..util.errors import WuerstchenError
from ..util.memory import free_memory
from .lines import BadLine, Line

BLOCK = 1000  # lines within which batches are made: those of a shard
NUMBERS_PER_CHANNEL = 12  # that Stage B holds at a time, for every position and channel of its first level
INDIVIDUAL = ("prompt", "negative_prompt", "seed", "seed_b")  # settings that pictures of a batch need not share


@dataclass(frozen=True)
class Share:
    """This process's part of the work: the `rank`th (from 0) of `world`."""

    rank: int = 0
    world: int = 1

    def has(self, number: int) -> bool:
        return number % self.world == self.rank

    @classmethod
    def of(cls, shard: str | None) -> "Share":
        """From `--shard I/N` (I from 1) and what `accelerate launch` says in the environment; with both, each of the N
        is shared by the launcher's processes. Raises WuerstchenError if it is not written like that."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if shard is None:
            return cls(rank, world)
        parts = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
        if not parts or not 1 <= int(parts[1]) <= int(parts[2]):
            raise WuerstchenError(f"--shard is {shard!r:.40}: it must be I/N with I from 1 to N, such as 3/16")
        return cls((int(parts[1]) - 1) * world + rank, int(parts[2]) * world)


def blocks(lines: Iterable[Line | BadLine], size: int = BLOCK) -> Iterator[tuple[int, list[Line], list[BadLine]]]:
    """(number, good lines, bad lines) of every block of `size` consecutive lines"""
    for number, several in groupby(lines, key=lambda line: line.index // size):
        good: list[Line] = []
        bad: list[BadLine] = []
        for line in several:
            (good if isinstance(line, Line) else bad).append(line)  # type: ignore[arg-type]
        yield number, good, bad


def batches(
    lines: Sequence[Line], texts: Callable[[Line], Hashable], size: Callable[[Line], int]
) -> Iterator[list[Line]]:
    """Lines that can be drawn together, at most `size(line)` at a time; `texts` tells lengths that must agree."""
    alike: dict[Hashable, list[Line]] = defaultdict(list)
    for line in lines:
        shared = tuple(sorted((name, value) for name, value in line.settings.items() if name not in INDIVIDUAL))
        alike[shared, line.loras, texts(line)].append(line)
    for several in alike.values():
        most = size(several[0])
        yield from (several[start : start + most] for start in range(0, len(several), most))


def fitting(line: Line, stage_b: StageBConfig, itemsize: int, device: torch.device, most: int) -> int:
    """How many pictures like this one half of the device's free memory holds: a power of two, `most` at most.

    Stage B needs the most, at its first level.
    """
    rows, columns = (side // stage_b.patch for side in line.geometry.stage_a)
    guided = 2 if line.settings["cfg_b"] != 1 else 1
    each = NUMBERS_PER_CHANNEL * itemsize * stage_b.widths[0] * rows * columns * guided
    free = free_memory(device)
    count = most
    while count > 1 and free is not None and count * each > free // 2:
        count //= 2
    return count
