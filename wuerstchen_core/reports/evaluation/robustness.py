"""How FID reacts to what happens to pictures on their way (paper, appendix B, table 3): FID against themselves."""

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageEnhance
from torch import Tensor

from ...bulk.plan import Share
from ..plots import plotted
from .distances import fid
from .extractors import Extractor
from .kept import Kept
from .processes import ALONE
from .reading import score

Operation = Callable[[Image.Image], Image.Image]
QUALITIES = (95, 90, 80, 70, 60, 50)  # of JPEG


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """Saved as JPEG with Pillow's other defaults, and read."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def resampled(picture: Image.Image, filter: Image.Resampling) -> Image.Image:
    """Scaled to half of its sides and back, by a filter of Pillow."""
    width, height = picture.size
    half = picture.resize((max(1, width // 2), max(1, height // 2)), filter)
    return half.resize(picture.size, filter)


def palette(picture: Image.Image) -> Image.Image:
    """256 colours of the picture's own, dithered: a palette of 8 bits."""
    return picture.quantize(256).convert("RGB")


def brighter(picture: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(factor)


def more_contrast(picture: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(picture).enhance(factor)


OPERATIONS: dict[str, Operation] = {
    **{f"JPEG {quality}": partial(jpeg, quality=quality) for quality in QUALITIES},
    "nearest": partial(resampled, filter=Image.Resampling.NEAREST),
    "bilinear": partial(resampled, filter=Image.Resampling.BILINEAR),
    "palette of 8 bits": palette,
    "brightness +10 %": partial(brighter, factor=1.1),
    "brightness -10 %": partial(brighter, factor=0.9),
    "contrast +10 %": partial(more_contrast, factor=1.1),
    "contrast -10 %": partial(more_contrast, factor=0.9),
}


def changed(image: Tensor, operation: Operation) -> Tensor:
    """image (3, H, W) in [0, 1] -> the same, rounded to bytes, after an operation on it"""
    pixels = rearrange((image * 255).round().byte(), "c h w -> h w c").numpy()
    after = operation(Image.fromarray(pixels))
    return (
        rearrange(
            torch.frombuffer(bytearray(after.tobytes()), dtype=torch.uint8), "(h w c) -> c h w", w=after.width, c=3
        )
        / 255
    )


def robustness(
    data: str | Path,
    extractor: Extractor,
    batch: int,
    limit: int | None = None,
    kept: Kept | None = None,
    share: Share = ALONE,
) -> tuple[dict, int]:
    """FID of the pictures of a set against themselves after each of OPERATIONS, and the number of pictures.

    The set is read once; kept and share are those of `score`.

    Raises WuerstchenError as `score` and `fid` do.
    """

    def after(operation: Operation):
        return lambda images, captions: extractor.score([changed(one, operation) for one in images], captions)

    scorers = {"features": extractor.score, **{name: after(operation) for name, operation in OPERATIONS.items()}}
    found = score(data, scorers, batch, limit, kept=kept, share=share)
    before = found.values["features"]
    return {name: fid(before, found.values[name]) for name in OPERATIONS}, len(found.keys)


def table(distances: dict[str, float]) -> Iterator[str]:
    yield "| operation | FID |"
    yield "|---|---|"
    for name, value in distances.items():
        yield f"| {name} | {value:.4g} |"


def plot(path: Path, distances: dict[str, float], title: str) -> None:
    names: Sequence[str] = sorted(distances, key=distances.__getitem__)
    with plotted(path, width=7.0, height=4.5) as (panel,):
        panel.barh(names, [distances[name] for name in names])
        panel.set(xlabel="FID against the pictures themselves", xlim=(0, None))
        panel.set_xscale("symlog", linthresh=1e-4)  # from palettes to brightness there may be five powers of ten
        panel.set_title(title, parse_math=False)
