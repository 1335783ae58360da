"""Aspect-ratio buckets: a few picture sizes of about the same area, so that a batch has one size and little is cut off.

The idea is NovelAI's (2022); a picture goes to the bucket whose aspect ratio is nearest, as ratios compare.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ...geometry import WORK_STEP
from ...util.errors import WuerstchenError

LONGEST = 2  # a bucket's longer side over its shorter one, at most

Size = tuple[int, int]  # (height, width) in pixels


def bucket_sizes(size: int) -> list[Size]:
    """Sizes of about `size` x `size` pixels, from upright to lying; their sides are multiples of 64.

    For every side it is the other side that comes nearest to the area. Raises WuerstchenError where `size` is no
    multiple of 64.
    """
    if size < WORK_STEP or size % WORK_STEP:
        raise WuerstchenError(f"size is {size}: with buckets it must be a multiple of {WORK_STEP}")
    count = size // WORK_STEP
    pairs = ((side, round(count**2 / side)) for side in range(1, 2 * count + 1))
    kept = [pair for pair in pairs if max(pair) <= LONGEST * min(pair)]
    both_ways = {*kept, *(pair[::-1] for pair in kept)}
    return sorted(((h * WORK_STEP, w * WORK_STEP) for h, w in both_ways), key=lambda s: s[1] / s[0])


def nearest_size(sizes: Sequence[Size], size: Size) -> Size:
    """The one of `sizes` whose aspect ratio is nearest to that of `size`, on a logarithmic scale."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: abs(math.log(s[0] / s[1]) - ratio))


def fit(image: Tensor, size: Size) -> Tensor:
    """image (3, H, W) in [0, 1] -> its middle (3, *size) in [0, 1], scaled so that it just covers `size`.

    What would be cut off is cut off first: a picture of any shape takes no more memory than before.
    """
    have = image.shape[1:]
    scale = max(wanted / side for wanted, side in zip(size, have))
    rows, columns = (min(side, max(1, round(wanted / scale))) for wanted, side in zip(size, have))
    top, left = (have[0] - rows) // 2, (have[1] - columns) // 2
    middle = image[None, :, top : top + rows, left : left + columns]
    return F.interpolate(middle, size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
