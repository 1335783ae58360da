"""ComfyUI's IMAGE as the core takes pictures: three channels, sides that are multiples of 8."""

import torch
from torch import Tensor

from ..wuerstchen_core import WuerstchenError
from ..wuerstchen_core.geometry import STEP


def rgb(image: Tensor, node: str) -> Tensor:
    """IMAGE (B, H, W, 1, 3 or 4) in [0, 1] -> (B, H, W, 3): grey on three channels, transparency on white.

    Raises WuerstchenError for anything else.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.dim() != 4:
        what = f"{image.dtype} of {_shape(image)}" if isinstance(image, Tensor) else type(image).__name__
        raise WuerstchenError(f"{node}: expected an IMAGE, floats of (pictures, height, width, channels), got {what}")
    if 0 in image.shape:
        raise WuerstchenError(f"{node}: this image is empty ({_shape(image)}): link one with at least one picture")
    channels = image.shape[-1]
    if channels == 1:
        return image.expand(-1, -1, -1, 3)
    if channels == 4:
        colour, alpha = image[..., :3], image[..., 3:].clamp(0, 1)
        return torch.lerp(torch.ones_like(colour), colour, alpha)
    if channels != 3:
        raise WuerstchenError(
            f"{node}: this image has {channels} channels: 1 (grey), 3 (RGB) or 4 (RGB and transparency) are supported"
        )
    return image


def whole_steps(image: Tensor, node: str) -> Tensor:
    """The middle of an image (B, H, W, C) whose sides are multiples of 8. Raises WuerstchenError below 8x8 pixels."""
    height, width = (side // STEP * STEP for side in image.shape[1:3])
    if not height or not width:
        raise WuerstchenError(
            f"{node}: this image is {image.shape[2]}x{image.shape[1]} pixels, at least {STEP}x{STEP} are needed"
        )
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
