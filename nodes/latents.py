"""ComfyUI's LATENT, IMAGE and MASK to the core's tensors and back.

A LATENT of ours is {"samples": (B, 16, p, q) of Stage C or (B, 4, h, w) of Stage A, KEY: Geometry}. The geometry keeps
the exact size of the picture; ComfyUI's own nodes copy it along, or drop it, or leave it on a latent that they resized.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..wuerstchen_core import Geometry, WuerstchenError
from ..wuerstchen_core.geometry import STEP
from ..wuerstchen_core.pipeline import fit

KEY = "wuerstchen"
SEMANTIC = "wuerstchen_semantic"  # in a CONDITIONING for Stage B: Stage C's latent


def pack(samples: Tensor, geometry: Geometry, like: dict | None = None) -> dict:
    """A LATENT; what else `like` holds (noise mask, batch index) is kept."""
    return {**(like or {}), "samples": samples, KEY: geometry}


def samples_of(latent: dict, channels: int, node: str, sources: str) -> Tensor:
    """The samples of a LATENT. Raises WuerstchenError if they are another stage's, naming the nodes to take it from."""
    samples = latent["samples"]
    if samples.dim() != 4 or samples.shape[1] != channels:
        raise WuerstchenError(
            f"{node} takes a latent of {channels} channels, this one is {'x'.join(map(str, samples.shape[1:]))}: "
            f"take it from {sources}"
        )
    return samples


def geometry_of_stage_c(latent: dict) -> Geometry:
    """The picture that a latent of Stage C is for: as noted on it if that still fits, else by its size."""
    size, noted = tuple(latent["samples"].shape[-2:]), latent.get(KEY)
    return noted if noted and noted.stage_c == size else Geometry.of_stage_c(*size)


def geometry_of_stage_a(latent: dict) -> Geometry | None:
    """The same for a latent of Stage A; None: the picture is the whole of it."""
    noted = latent.get(KEY)
    return noted if noted and noted.stage_a == tuple(latent["samples"].shape[-2:]) else None


def mask_of(latent: dict, geometry: Geometry) -> Tensor | None:
    """The LATENT's noise mask as (1 or B, 1, p, q), or None; it is cut as the picture was."""
    if "noise_mask" not in latent:
        return None
    batch, _, rows, columns = latent["samples"].shape
    mask = rearrange(latent["noise_mask"], "... h w -> (...) h w 1").float()
    mask = rearrange(fit(mask, geometry), "b h w 1 -> b 1 h w")
    mask = F.pad(mask, geometry.margins, mode="replicate")
    mask = F.interpolate(mask, size=(rows, columns), mode="area")
    return mask if len(mask) == 1 else mask.repeat(-(-batch // len(mask)), 1, 1, 1)[:batch]


def picture(image: Tensor) -> Tensor:
    """IMAGE (B, H, W, 3 or 4) -> the same without transparency, cut to sides that are multiples of 8."""
    height, width = (side // STEP * STEP for side in image.shape[1:3])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width, :3]


def cropped(image: Tensor, geometry: Geometry | None) -> Tensor:
    """IMAGE as the networks work on it -> the picture in its middle; all of it where that is not known."""
    if geometry is None:
        return image
    left, _, top, _ = geometry.margins
    return image[:, top : top + geometry.height, left : left + geometry.width]
