"""ComfyUI's LATENT and MASK to the core's tensors and back; the exact size of the picture goes along.

A LATENT of ours is {"samples": (B, 16, p, q) of Stage C or (B, 4, h, w) of Stage A, KEY: Noted}. The networks work on
pictures whose sides are multiples of 64, the frame; the picture that was asked for lies in its middle. What ComfyUI's
own nodes do to a LATENT tells how large the picture is afterwards:

- The samples keep their shape (blend, composite, flip, batch, noise mask, arithmetic): the size stays.
- They were turned by 90 or 270 degrees: width and height change places. On a square latent this is seen in the order of
  the samples in memory, which `torch.rot90` leaves exchanged, or in their values. After a copy that restores the order
  and changes the values (turning, then resizing, a square latent) it can't be seen.
- They were resized: the picture keeps its share of the frame, rounded to multiples of 8.
- They were cut or joined to others: the picture is the whole frame.
- The size was lost (RebatchLatents keeps nothing beside samples, mask and index; SaveLatent stores the samples alone):
  the picture is the whole frame, the largest one that the latent can stand for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..wuerstchen_core import Geometry, WuerstchenError
from ..wuerstchen_core.geometry import STAGE_A_FACTOR, STEP
from ..wuerstchen_core.pipeline import fit
from . import host

KEY = "wuerstchen"
SEMANTIC = "wuerstchen_semantic"  # in a CONDITIONING for Stage B: Stage C's latent
OPEN = (1, 1)  # rows and columns of an empty latent whose size its sampler chooses; no picture's are as few
OPEN_KEY = "wuerstchen_open"

NUMBER = 2.0**-100  # times a picture's number, it fills an empty latent: far below what noise can show

SMALLEST_SIDE, LARGEST_SIDE = 128, 4096  # pixels
LARGEST_EMPTY = 24  # positions of Stage C: 1024 pixels
MOST_ENLARGED = 4  # times a side
SIZE_IT = "set width and height of Würstchen Empty Latent, or link Stage C's MODEL to it"
UNITS = "a position of Stage C is 42.67 pixels a side, not 8"
PLACES_TRIED = 64
MOST_PICTURES = 65_536


@dataclass(frozen=True, eq=False)
class Noted:
    """The picture of a latent, and the samples that this was noted for."""

    geometry: Geometry
    samples: Tensor


def picture_size(width: int, height: int) -> Geometry:
    """Raises WuerstchenError if a side is not a multiple of 8 from 128 to 4096."""
    for name, side in (("width", width), ("height", height)):
        if side % STEP or not SMALLEST_SIDE <= side <= LARGEST_SIDE:
            raise WuerstchenError(
                f"{name} is {side}: it must be a multiple of {STEP} from {SMALLEST_SIDE} to {LARGEST_SIDE}"
            )
    return Geometry(width, height)


def picture_size_or(width: int, height: int, side: int | None) -> Geometry | None:
    """The same where both sides may be 0, which is the model's own side; None where that is not known either."""
    if not width and not height:
        return None if side is None else picture_size(side, side)
    if not width or not height:
        name, other = ("width", "height") if not width else ("height", "width")
        raise WuerstchenError(f"{name} is 0, the model's own size, but {other} is not: set both, or both to 0")
    return picture_size(width, height)


def open_latent(batch_size: int, channels: int) -> dict:
    """An empty LATENT whose size Stage C's sampler chooses."""
    return {"samples": torch.zeros(batch_size, channels, *OPEN), OPEN_KEY: True}


def is_open(latent: dict) -> bool:
    return latent.get(OPEN_KEY, False) or (tuple(latent["samples"].shape[-2:]) == OPEN and not latent["samples"].any())


def sized(latent: dict, side: int) -> dict:
    """An open LATENT as one of the model's own size; others as they are."""
    if not is_open(latent):
        return latent
    batch, channels, *size = latent["samples"].shape
    if tuple(size) != OPEN:
        raise WuerstchenError(f"this latent was resized before it had a size: {SIZE_IT}")
    geometry = Geometry(side, side)
    rest = {name: value for name, value in latent.items() if name != OPEN_KEY}
    return pack(torch.zeros(batch, channels, *geometry.stage_c), geometry, like=rest)


def pack(samples: Tensor, geometry: Geometry, like: dict | None = None) -> dict:
    """A LATENT; what else `like` holds (noise mask, batch index) is kept."""
    samples = host.devices.to_intermediate(
        samples
    ).contiguous()  # the order in memory says later whether they were turned
    return {**(like or {}), "samples": samples, KEY: Noted(geometry, samples)}


def numbered(samples: Tensor) -> Tensor:
    """Empty samples (B, C, rows, columns) filled with the numbers of their pictures, by which `numbers_of` knows them
    after they were taken out of their batch, put into another order or repeated."""
    numbers = torch.arange(1, len(samples) + 1, dtype=samples.dtype, device=samples.device) * NUMBER
    return samples + numbers[:, None, None, None]


def numbers_of(samples: Tensor) -> list[int] | None:
    """The places, from 0 on, of pictures in the batch that was numbered; None if any is not empty, or is a mixture."""
    numbers = samples.flatten(1) / NUMBER
    least, most = numbers.amin(dim=1), numbers.amax(dim=1)
    whole = (most - most.round()).abs().max() < 0.1 and (most - least).max() < 0.1
    if not whole or least.min() < 0.5 or most.max() > MOST_PICTURES:
        return None
    return [round(number) - 1 for number in most.tolist()]


def samples_of(latent: dict, channels: int, node: str, sources: str) -> Tensor:
    """The samples (B, channels, rows, columns) of a LATENT, B >= 1.

    Raises WuerstchenError if there are none or they are another stage's, naming the nodes to take them from.
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, Tensor):
        raise WuerstchenError(f"{node} takes a latent, not {type(latent).__name__}: take it from {sources}")
    if samples.dim() != 4 or samples.shape[1] != channels:
        raise WuerstchenError(
            f"{node} takes a latent of {channels} channels, this one is {'x'.join(map(str, samples.shape[1:]))}: "
            f"take it from {sources}"
        )
    if 0 in samples.shape:
        raise WuerstchenError(
            f"{node}: this latent is empty ({'x'.join(map(str, samples.shape))}), there is nothing to draw: "
            f"take it from {sources}"
        )
    return samples


def geometry_of_stage_c(latent: dict) -> Geometry:
    """The picture that a latent of Stage C is for.

    Raises WuerstchenError if it is larger than anybody can have meant, as where pixels were counted as in other models.
    """
    samples, noted = latent["samples"], latent.get(KEY)
    if is_open(latent):
        raise WuerstchenError(
            f"this latent has no size yet, Stage C's sampler gives it one: draw it first, or {SIZE_IT}"
        )
    rows, columns = samples.shape[-2:]
    largest = max(Geometry(LARGEST_SIDE, LARGEST_SIDE).stage_c)
    what = f"a latent of {rows}x{columns} is too large for Stage C"
    if max(rows, columns) > largest:
        raise WuerstchenError(f"{what}, {largest}x{largest} ({LARGEST_SIDE} pixels a side) is the largest: {UNITS}")
    if isinstance(noted, Noted):
        before = noted.samples.shape[-2:]
        if max(rows, columns) > MOST_ENLARGED * max(before):
            raise WuerstchenError(
                f"{what}, it was enlarged from {before[0]}x{before[1]}: {UNITS}; use LatentUpscaleBy with a factor of "
                f"{MOST_ENLARGED} at most"
            )
    elif KEY not in latent and max(rows, columns) > LARGEST_EMPTY and not samples.any():
        frame = Geometry.of_stage_c(rows, columns)
        raise WuerstchenError(
            f"an empty latent of {rows}x{columns} stands for {frame.width}x{frame.height} pixels in Stage C: {UNITS}; "
            "take it from Würstchen Empty Latent"
        )
    height, width = _size(latent, _frame_of_stage_c)
    return Geometry(width, height)


def geometry_of_stage_a(latent: dict) -> Geometry | None:
    """The same for a latent of Stage A; None: the picture is the whole of it."""
    frame = _frame_of_stage_a(*latent["samples"].shape[-2:])
    height, width = _size(latent, _frame_of_stage_a)
    return None if (height, width) == frame or min(frame) < STEP else Geometry(width, height)


def cut(images: Tensor, geometry: Geometry | None) -> Tensor:
    """images (B, H, W, 3) of a whole frame -> the picture in their middle (B, height, width, 3)"""
    if geometry is None:
        return images
    top, left = (images.shape[1] - geometry.height) // 2, (images.shape[2] - geometry.width) // 2
    return images[:, top : top + geometry.height, left : left + geometry.width]


def mask_of(latent: dict, geometry: Geometry) -> Tensor | None:
    """The noise mask of a latent of Stage C as (1 or B, 1, p, q), or None; it is cut as the picture was."""
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    batch, _, rows, columns = latent["samples"].shape
    height, width = _frame_of_stage_c(rows, columns)
    down, across = height - geometry.height, width - geometry.width
    mask = rearrange(mask, "... h w -> (...) h w 1").float()
    mask = rearrange(fit(mask, geometry), "b h w 1 -> b 1 h w")
    mask = F.pad(mask, (across // 2, across - across // 2, down // 2, down - down // 2), mode="replicate")
    mask = F.interpolate(mask, size=(rows, columns), mode="area")
    return mask if len(mask) == 1 else mask.repeat(-(-batch // len(mask)), 1, 1, 1)[:batch]


def refuse_unfollowed_mask(latent: dict, geometry: Geometry, node: str) -> None:
    """Raises WuerstchenError if Stage C's latent has a noise mask that its sampler has not followed."""
    mask = latent.get("noise_mask")
    if mask is None:
        return
    mask = rearrange(mask, "... h w -> (...) 1 h w")
    if not any(host.masks.is_followed(latent["samples"], each) for each in (mask, mask_of(latent, geometry))):
        raise WuerstchenError(
            f"{node}: this latent has a noise mask that no sampler with Stage C has followed, and Stage B draws the "
            "whole picture anew: set the mask before Stage C's sampler, or for Stage B on the latent of Würstchen "
            "VQGAN Encode that a KSampler starts from"
        )


def _frame_of_stage_c(rows: int, columns: int) -> tuple[int, int]:
    """(height, width) in pixels"""
    return Geometry.of_stage_c(rows, columns).work


def _frame_of_stage_a(rows: int, columns: int) -> tuple[int, int]:
    return rows * STAGE_A_FACTOR, columns * STAGE_A_FACTOR


def _size(latent: dict, frame: Callable[[int, int], tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of the picture, by the rules above; `frame` is that of a latent's rows and columns."""
    samples, noted = latent["samples"], latent.get(KEY)
    whole = frame(*samples.shape[-2:])
    if not isinstance(noted, Noted) or noted.samples.shape[1] != samples.shape[1]:
        return whole
    if _is_other_part(samples, noted.samples):
        return whole
    before, size = tuple(noted.samples.shape[-2:]), (noted.geometry.height, noted.geometry.width)
    if _is_turned(samples, noted.samples):
        before, size = before[::-1], size[::-1]
    return tuple(
        side if now == old else min(now // STEP * STEP, max(STEP, int(side * now / old / STEP + 0.5) * STEP))
        for side, now, old in zip(size, whole, frame(*before), strict=True)
    )


def _is_turned(samples: Tensor, noted: Tensor) -> bool:
    """Whether rows and columns have changed places, by their proportions or, on a square, by order and values."""
    (rows, columns), (rows_before, columns_before) = samples.shape[-2:], noted.shape[-2:]
    if rows * columns_before != columns * rows_before:
        return rows * rows_before == columns * columns_before
    if rows != columns:
        return False
    if samples.stride(2) < samples.stride(3):
        return True
    if noted.shape != (len(noted), *samples.shape[1:]) or _is_among(samples, noted):
        return False
    turned = noted.transpose(2, 3)
    return any(_is_among(samples, turned.flip(flipped)) for flipped in ((), (2,), (3,), (2, 3)))


def _is_among(samples: Tensor, noted: Tensor) -> bool:
    """Whether the first of the samples is one of those noted."""
    return bool((noted.to(samples) == samples[:1]).flatten(1).all(dim=1).any())


def _is_other_part(samples: Tensor, noted: Tensor) -> bool:
    """Whether the samples are a part of those noted, or those noted a part of them."""
    size, before = samples.shape[-2:], noted.shape[-2:]
    if samples.stride(1) not in (size.numel(), 1):  # a view of more
        return True
    if size == before or (noted == noted[..., :1, :1]).all():
        return False
    if all(now <= old for now, old in zip(size, before, strict=True)):
        return any(_is_window(samples[0], whole) for whole in noted.to(samples))
    return _is_window(noted[0].to(samples), samples[0])


def _is_window(small: Tensor, large: Tensor) -> bool:
    """Whether (C, r, c) is found somewhere in (C, R, S)."""
    rows, columns = small.shape[1:]
    down, across = large.shape[1] - rows + 1, large.shape[2] - columns + 1
    if down < 1 or across < 1:
        return False
    first = large[:, :down, :across] == small[:, :1, :1]
    last = large[:, rows - 1 :, columns - 1 :] == small[:, -1:, -1:]
    places = (first & last).all(dim=0).nonzero()[:PLACES_TRIED].tolist()
    return any(small.equal(large[:, y : y + rows, x : x + columns]) for y, x in places)
