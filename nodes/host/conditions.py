"""What a conditioning entry brings to a run, as ComfyUI batches it: the semantic latent, and a memory.

ComfyUI repeats and concatenates every entry's tensors anew at each step; what the networks make of them is the same all
through a run.
"""

import itertools
from collections.abc import Callable

import comfy.conds
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...wuerstchen_core.geometry import STAGE_A_FACTOR, WORK_STEP

STRIDE = WORK_STEP // STAGE_A_FACTOR  # Stage B takes latents whose sides are multiples of this
FINEST = 4  # positions of its latent to one of the finest level that reads the features


class Memory:
    """What one conditioning entry has had computed in a run; it lives as long as the run."""

    numbers = itertools.count()

    def __init__(self):
        self.number = next(self.numbers)
        self.computed: dict = {}


class CONDMemory(comfy.conds.CONDRegular):
    """Carries an entry's memory to the model; entries that are batched bring a tuple of theirs."""

    def __init__(self):
        super().__init__(Memory())

    def process_cond(self, batch_size, **kwargs):
        return self

    def can_concat(self, other):
        return True

    def concat(self, others):
        return (self.cond, *(other.cond for other in others))

    def size(self):
        return [1]


def remembered(memories: tuple[Memory, ...], inputs: tuple, compute: Callable):
    """compute(), or what it gave for the same entries and tensors of the same shapes earlier in the run."""
    shapes = (value.shape if isinstance(value, Tensor) else value for value in inputs)
    key = (*(memory.number for memory in memories), *shapes)
    computed = memories[0].computed
    if key not in computed:
        computed[key] = compute()
    return computed[key]


class CONDSemantic(comfy.conds.CONDRegular):
    """Raw features (B, 16, p, q) of the picture; an area of the picture gets its part of them.

    `size` is that of Stage B's latent. The features are those of the next size that the network can take, in whose
    middle the latent lies.
    """

    def __init__(self, features: Tensor, size: tuple[int, int]):
        super().__init__(features)
        self.picture = size

    def _copy_with(self, features):
        return CONDSemantic(features, self.picture)

    def process_cond(self, batch_size, area=None, **kwargs):
        features = self.cond if area is None else self._part(area)
        return self._copy_with(comfy.utils.repeat_to_batch_size(features, batch_size))

    def _part(self, area) -> Tensor:
        """Cut at the resolution of the finest level that reads it, where the network's own resizing changes nothing."""
        sizes = [padded(side) // FINEST for side in self.picture]
        fine = F.interpolate(self.cond.float(), size=sizes, mode="bicubic", antialias=True, align_corners=True)
        for axis, (length, start) in enumerate(zip(area[:2], area[2:], strict=True)):
            first = round((start + margin(self.picture[axis]) - margin(length)) / FINEST)
            places = torch.arange(first, first + padded(length) // FINEST, device=fine.device)
            fine = fine.index_select(axis + 2, places.clamp(0, sizes[axis] - 1))
        return fine.to(self.cond)


def padded(side: int) -> int:
    """The next side of a latent that Stage B can take."""
    return -(-side // STRIDE) * STRIDE


def margin(side: int) -> int:
    """How much of what is added lies before the latent."""
    return (padded(side) - side) // 2
