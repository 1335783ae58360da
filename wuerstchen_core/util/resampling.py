"""Pictures scaled to the size that is asked for, by antialiased bicubic interpolation."""

import math

import torch
from einops import rearrange
from torch import Tensor

BLOCK = 32


def cover(image: Tensor, height: int, width: int) -> Tensor:
    """image (B, H, W, C) -> (B, height, width, C): scaled to cover that size, its middle cut out.

    Only what is seen is computed: a thin picture takes no more memory than another.
    """
    planes = rearrange(image, "b h w c -> b c h w").float()
    sides = image.shape[1:3]
    scale = max(height / sides[0], width / sides[1])
    cuts = []
    for dim, side, seen in ((2, sides[0], height), (3, sides[1], width)):
        size = max(seen, round(side * scale))
        cuts.append((seen / side, dim, size, (size - seen) // 2, seen))
    for _, *cut in sorted(cuts):  # what shrinks most comes first
        planes = _resample(planes, *cut)
    return rearrange(planes.clamp(0, 1), "b c h w -> b h w c")


def _resample(planes: Tensor, dim: int, size: int, start: int, count: int) -> Tensor:
    """Rows `start` to `start + count` of what antialiased bicubic scaling of a dimension to `size` would give.

    BLOCK of them at a time are one matrix product with what lies under their taps.
    """
    side = planes.shape[dim]
    step = side / size
    stretch = max(step, 1.0)
    centres = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * step
    blocks = []
    for some in centres.split(BLOCK):
        first = max(0, math.floor(some[0] - 2 * stretch))
        seen = torch.arange(first, min(side, math.ceil(some[-1] + 2 * stretch) + 1))
        weights = _keys((seen + 0.5 - some[:, None]).abs() / stretch)
        weights = (weights / weights.sum(dim=1, keepdim=True)).to(planes)
        part = planes.narrow(dim, first, len(seen))
        blocks.append(weights @ part if dim == 2 else part @ weights.T)
    return torch.cat(blocks, dim)


def _keys(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, as antialiased scaling has it."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
