"""Pictures -> tensors, as they are meant to be seen: turned upright, in sRGB, transparency on white."""

import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from .checks import shown
from .errors import WuerstchenError, first_line
from .notices import tell_once

# What is read of what Pillow knows; some of its other formats start programs (EPS: Ghostscript).
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations with rows and columns exchanged
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # ICC's colour spaces, in Pillow's words
OVERSHOOT = 0.5  # how far beyond [0, 1] values may be, as sharpening leaves them; further, they have another range


def read_picture(path: str | Path) -> Tensor:
    """A picture file -> (H, W, 3) in [0, 1], sRGB.

    Raises:
        WuerstchenError: it is missing, not a regular file, not of one of FORMATS, damaged or too large.
    """
    try:
        return decode(path)
    except FileNotFoundError as error:
        raise WuerstchenError(f"{path}: there is no such file") from error
    except UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise WuerstchenError(f"{path}: not a picture that can be read (in none of the formats {formats})") from error
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        raise WuerstchenError(f"{path}: not a picture that can be read ({first_line(error)})") from error


def decode(file: str | Path | BinaryIO, formats: Sequence[str] = FORMATS) -> Tensor:
    """A picture in one of Pillow's `formats` -> (H, W, 3) in [0, 1], sRGB.

    A colour profile that cannot be used is left out, which is told once.

    Raises what Pillow raises for damaged files, which is nearly anything.
    """
    with _opened(file, formats) as opened:
        return _to_tensor(opened)


def size_of(file: str | Path | BinaryIO, formats: Sequence[str] = FORMATS) -> tuple[int, int]:
    """(height, width) that `decode` gives, from the file's header alone."""
    with _opened(file, formats) as opened:
        # Pillow looks for the EXIF data of a PNG file behind the pixels, too, and would decode them.
        exif = opened.getexif() if opened.format != "PNG" or "exif" in opened.info else {}
        sideways = exif.get(ExifTags.Base.Orientation) in SIDEWAYS
        return opened.size if sideways else opened.size[::-1]


def texts_of(path: str | Path) -> dict[str, str]:
    """The texts that a PNG file carries before its pixels, by their keys; its pixels are not decoded.

    Pillow refuses texts that unfold to more than a megabyte each, and 64 in all.

    Raises:
        WuerstchenError: it is missing, not a PNG file, damaged, or what is refused.
    """
    try:
        with _opened(path, ("PNG",)) as opened:
            return {str(key): str(value) for key, value in opened.info.items() if isinstance(value, str)}
    except FileNotFoundError as error:
        raise WuerstchenError(f"{path}: there is no such file") from error
    except UnidentifiedImageError as error:
        raise WuerstchenError(f"{path}: not a PNG file, or a damaged one") from error
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        raise WuerstchenError(f"{path}: not a PNG file that can be read ({first_line(error)})") from error


def as_images(image: Tensor | np.ndarray | Image.Image) -> Tensor:
    """One picture or a batch of them, in memory -> (B, H, W, 3) float32 in [0, 1].

    Args:
        image: a tensor or array (H, W, C) or (B, H, W, C) of floats in [0, 1] or of bytes, or a PIL image. C is 1
            (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha); what is transparent lies on white.

    Raises:
        WuerstchenError: it is something else, or has no pixels.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise WuerstchenError(f"image has the size {image.width}x{image.height}: there is no picture in it")
        try:
            return _to_tensor(image)[None]
        except Exception as error:
            raise WuerstchenError(f"image: a PIL image that cannot be read ({error})") from error
    if isinstance(image, np.ndarray) and image.dtype.kind in "fu" and image.dtype.itemsize <= 8:
        image = torch.from_numpy(np.array(image, np.float32 if image.dtype.kind == "f" else None, order="C"))
    if not isinstance(image, Tensor) or image.is_meta or image.layout != torch.strided:
        kind = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else shown(image)
        raise WuerstchenError(f"image is {kind}: it must be a tensor or array (B, H, W, 3), or a PIL image")
    shape = "x".join(map(str, image.shape))
    if image.dim() not in (3, 4) or image.shape[-1] not in (1, 2, 3, 4):
        raise WuerstchenError(
            f"image has the shape {shape or 'of a single number'}: it must be (H, W, C) or (B, H, W, C), "
            "C from 1 to 4 channels"
        )
    if image.numel() == 0:
        raise WuerstchenError(f"image has the shape {shape}: there is no picture in it")
    if image.dtype == torch.uint8:
        image = image.float() / 255
    elif not image.is_floating_point():
        raise WuerstchenError(f"image holds {image.dtype}: it must hold floats in [0, 1], or bytes (uint8)")
    image = image.float() if image.dim() == 4 else image.float()[None]
    least, most = (extreme.item() for extreme in image.aminmax())
    if not -OVERSHOOT <= least <= most <= 1 + OVERSHOOT:
        raise WuerstchenError(f"image holds values from {least:g} to {most:g}: floats must be in [0, 1]")
    return on_white(image.clamp(0, 1))


def on_white(image: Tensor) -> Tensor:
    """image (B, H, W, C) in [0, 1] of grey, grey and alpha, RGB, or RGB and alpha -> (B, H, W, 3) on white"""
    channels = image.shape[-1]
    if channels in (2, 4):
        alpha = image[..., -1:]
        image = image[..., :-1] * alpha + (1 - alpha)
    return image.expand(*image.shape[:-1], 3)


def _to_tensor(picture: Image.Image) -> Tensor:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F"):
        raise ValueError("its values have 32 bits, and nothing says which of them is white")
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        transparent = picture.convert("RGBA")
        colours = transparent.convert("L" if picture.mode in ("L", "LA", "La") else "RGB")
        picture = _to_srgb(colours, profile)
        picture.putalpha(transparent.getchannel("A"))
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    else:
        picture = _to_srgb(picture, profile)
    return torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque picture in RGB; with a usable ICC profile, its colours as the profile means them."""
    if picture.mode not in PROFILE_MODES.values():
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    if profile:
        try:
            return _srgb_transform(profile, picture.mode).apply(picture)
        except Exception:  # a broken profile raises nearly anything
            tell_once("a picture's colour profile is broken or for other pixels: such pictures are read without it")
    return picture.convert("RGB")


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


@contextmanager
def _opened(file: str | Path | BinaryIO, formats: Sequence[str]) -> Iterator[Image.Image]:
    if isinstance(file, (str, Path)) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is not a regular file")
    Image.init()
    known = [name for name in formats if name in Image.OPEN]  # what this Pillow was built with
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow thinks of a damaged file's fields
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=known) as opened:
            yield opened
