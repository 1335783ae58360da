"""Picture files -> tensors, as the pictures are meant to be seen: turned upright, transparency on white."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .errors import WuerstchenError

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations with rows and columns exchanged


def read_picture(path: str | Path) -> Tensor:
    """A picture file -> (H, W, 3) in [0, 1], sRGB. Raises WuerstchenError where it is missing or can't be read."""
    try:
        return decode(path)
    except FileNotFoundError as error:
        raise WuerstchenError(f"{path}: there is no such file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise WuerstchenError(f"{path}: not a picture that can be read ({error})") from error


def decode(file: str | Path | BinaryIO, formats: Sequence[str] | None = None) -> Tensor:
    """A picture, in one of Pillow's `formats` where given -> (H, W, 3) in [0, 1], sRGB.

    Raises what Pillow raises for damaged files, which is nearly anything.
    """
    with _opened(file, formats) as opened:
        picture = ImageOps.exif_transpose(opened)
    if picture.mode in ("I", "F"):
        raise ValueError("its values have 32 bits, and nothing says which of them is white")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255


def size_of(file: str | Path | BinaryIO, formats: Sequence[str] | None = None) -> tuple[int, int]:
    """(height, width) that `decode` gives, from the file's header alone."""
    with _opened(file, formats) as opened:
        # Pillow looks for the EXIF data of a PNG file behind the pixels, too, and would decode them.
        exif = opened.getexif() if opened.format != "PNG" or "exif" in opened.info else {}
        sideways = exif.get(ExifTags.Base.Orientation) in SIDEWAYS
        return opened.size if sideways else opened.size[::-1]


@contextmanager
def _opened(file: str | Path | BinaryIO, formats: Sequence[str] | None) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=formats) as opened:
            yield opened
