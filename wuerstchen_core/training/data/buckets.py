"""Aspect-ratio buckets: a few picture sizes of about the same area, so that a batch has one size and little is cut off.

The idea is NovelAI's (2022); a picture goes to the bucket whose aspect ratio is nearest on a logarithmic scale.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ...geometry import WORK_STEP
from ...util.errors import WuerstchenError

LONGEST = 2  # largest ratio of a bucket's longer side to its shorter one

Size = tuple[int, int]  # (height, width) in pixels


def bucket_sizes(size: int) -> list[Size]:
    """Sizes of about `size` x `size` pixels, from portrait to landscape; their sides are multiples of 64.

    Each side is paired with the other side that comes nearest to the area. Raises WuerstchenError if `size` is not a
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


def crop_and_resize(image: Tensor, size: Size) -> Tensor:
    """image (3, H, W) in [0, 1] -> its centre (3, *size) in [0, 1], scaled so that it just covers `size`.

    It is cropped before it is resized, so that a picture of any shape needs no more memory than it has already.
    """
    rows, columns = image.shape[1:]
    scale = max(size[0] / rows, size[1] / columns)
    height, width = min(rows, max(1, round(size[0] / scale))), min(columns, max(1, round(size[1] / scale)))
    top, left = (rows - height) // 2, (columns - width) // 2
    centre = image[None, :, top : top + height, left : left + width]
    return F.interpolate(centre, size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
