"""Pictures scaled to the size that is asked for, by antialiased bicubic interpolation."""

import math

import torch
from einops import rearrange
from torch import Tensor


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
    """Rows `start` to `start + count` of what antialiased bicubic scaling of a dimension to `size` would give."""
    side = planes.shape[dim]
    step = side / size
    stretch = max(step, 1.0)
    centres = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * step
    taps = torch.arange(math.ceil(4 * stretch) + 1)
    index = (centres - 2 * stretch).floor().long()[:, None] + taps
    weights = _keys((index + 0.5 - centres[:, None]).abs() / stretch) * ((index >= 0) & (index < side))
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(planes)
    index = index.clamp(0, side - 1).to(planes.device)
    shape = [-1 if i == dim else 1 for i in range(4)]
    resampled = torch.zeros_like(planes.narrow(dim, 0, 1)).repeat_interleave(count, dim)
    for column, weight in zip(index.T, weights.T, strict=True):
        resampled.addcmul_(planes.index_select(dim, column), weight.reshape(shape))
    return resampled


def _keys(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, as antialiased scaling has it."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
