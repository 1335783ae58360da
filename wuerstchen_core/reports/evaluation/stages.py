"""How much Stage B changes what Stage C decided, and what its text is for (paper, appendices D and J)."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ... import pipeline
from ...geometry import Geometry
from ...pipeline import Sampling, Wuerstchen
from .distances import fid, psnr
from .drawing import batches, draw_latent, finish
from .extractors import Extractor
from .preference import WinRate, counted, win_rate
from .text_scores import Score

PREVIEW, SMALL = "preview", "at the preview's size"
WITH, WITHOUT, RESEEDED = "with text", "without text", "other noise"
NEXT = "another prompt"
PAIRS = {  # what is compared with what
    "B + A and the preview of its latent": (SMALL, PREVIEW),
    "B + A and the preview of another prompt's": (SMALL, NEXT),
    "B + A without text and with it": (WITHOUT, WITH),
    "B + A from other noise and from the same": (RESEEDED, WITH),
}
SHEET = {PREVIEW: "preview", WITH: "B + A with text", WITHOUT: "B + A without text"}
COLUMNS = 8
SIDE, LABEL, CAPTION = 192, 130, 20  # of the sheet, in pixels


class Compared(NamedTuple):
    """Two pictures of each prompt: means over the prompts, and FID between the two sets."""

    name: str
    psnr: float | None  # dB; None where some are equal
    cosine: float  # of features
    fid: float | None  # None for a single prompt, or where one set holds the pictures of the other


@dataclass
class Drawn:
    rows: list[Compared]
    features: dict[str, Tensor]  # (N, F) by the ways of drawing
    shown: dict[str, list[Tensor]]  # of each way the first COLUMNS pictures (H, W, 3)
    prompts: list[str]  # theirs
    picks: dict[str, Tensor]  # PickScores (N,), of B + A with text and without


def draw(
    model: Wuerstchen,
    prompts: Sequence[str],
    geometry: Geometry,
    sampling: Sampling,
    extractor: Extractor,
    batch: int,
    seed: int = 0,
    pick: Score | None = None,
) -> Drawn:
    """Each prompt once by Stage C, then by the previewer, and by Stages B and A with text, without, from other noise.

    Without a previewer, or a text encoder for Stage B, what needs it is left out.

    Args:
        geometry: sides are multiples of 64, so that a preview has no margins.
        batch: pictures at a time, two or more: previews are also compared with another picture of their batch.
        pick: PickScore, for what Stage B's text is worth.

    Raises WuerstchenError if a prompt can't be read.
    """
    features: dict[str, list[Tensor]] = defaultdict(list)
    ratios, cosines = (defaultdict[str, list[Tensor]](list) for _ in range(2))
    shown: dict[str, list[Tensor]] = defaultdict(list)
    picks: dict[str, list[Tensor]] = defaultdict(list)
    captions: list[str] = []
    with model.drawn_with(sampling), tqdm(total=len(prompts), unit="prompt", leave=False) as bar:
        for some in batches(model, prompts, seed, batch):
            latent = draw_latent(model, some, geometry, sampling.stage_c)
            other = some._replace(seeds=[one + len(prompts) for one in some.seeds])
            ways = {WITH: finish(model, latent, some, geometry, sampling.stage_b)}
            ways[RESEEDED] = finish(model, latent, other, geometry, sampling.stage_b)
            if model.text_encoder_b is not None:
                ways[WITHOUT] = finish(model, latent, some, geometry, sampling.stage_b, with_text=False)
            if model.previewer is not None:
                ways[PREVIEW] = pipeline.preview(model.previewer, latent).cpu()
                ways[SMALL] = _scaled(ways[WITH], ways[PREVIEW].shape[1:3])
            seen = {
                way: extractor.score([*rearrange(images, "b h w c -> b c h w")], []) for way, images in ways.items()
            }
            for way in ways:
                features[way].append(seen[way])
                shown[way] += ways[way][: COLUMNS - len(shown[way])]
            if pick is not None and WITHOUT in ways:
                for way in (WITH, WITHOUT):
                    picks[way].append(pick([*rearrange(ways[way], "b h w c -> b c h w")], some.prompts))
            captions += some.prompts[: COLUMNS - len(captions)]
            if model.previewer is not None and len(some.numbers) > 1:
                ways[NEXT], seen[NEXT] = ways[PREVIEW].roll(1, 0), seen[PREVIEW].roll(1, 0)
            for name, (one, another) in PAIRS.items():
                if one in ways and another in ways:
                    ratios[name].append(psnr(ways[one].double(), ways[another].double()))
                    cosines[name].append(F.cosine_similarity(seen[one].double(), seen[another].double()))
            bar.update(len(some.numbers))
    found = {way: torch.cat(parts) for way, parts in features.items()}
    rows = []
    for name, (one, another) in PAIRS.items():
        if name in ratios:
            ratio, cosine = (torch.cat(parts[name]).mean().item() for parts in (ratios, cosines))
            distance = fid(found[another], found[one]) if another in found and len(prompts) > 1 else None
            rows.append(Compared(name, ratio if math.isfinite(ratio) else None, cosine, distance))
    return Drawn(rows, found, shown, captions, {way: torch.cat(parts) for way, parts in picks.items()})


def against(drawn: Drawn, real: Tensor) -> dict[str, float]:
    """FID of each way's pictures against the features (M, F) of real ones."""
    return {title: fid(real, drawn.features[way]) for way, title in SHEET.items() if way in drawn.features}


def preferred(drawn: Drawn) -> WinRate | None:
    """How often PickScore prefers B + A without text to B + A with it; None where it was not asked."""
    return win_rate(*counted(drawn.picks[WITHOUT], drawn.picks[WITH])) if drawn.picks else None


def table(rows: Sequence[Compared]) -> Iterator[str]:
    yield "| compared | PSNR, dB | cosine of features | FID |"
    yield "|---|---|---|---|"
    for row in rows:
        ratio = "equal" if row.psnr is None else f"{row.psnr:.2f}"
        yield f"| {row.name} | {ratio} | {row.cosine:.4f} | {'' if row.fid is None else f'{row.fid:.4g}'} |"


def sheet(drawn: Drawn) -> Image.Image:
    """A row for each of SHEET, a column for each of the prompts; previews have their own pixels, only larger."""
    ways = [way for way in SHEET if way in drawn.shown]
    height, width = drawn.shown[WITH][0].shape[:2]
    tall = round(SIDE * height / width)
    font = ImageFont.load_default(12)
    picture = Image.new("RGB", (LABEL + SIDE * len(drawn.prompts), CAPTION + tall * len(ways)), "white")
    pen = ImageDraw.Draw(picture)
    for column, prompt in enumerate(drawn.prompts):
        while pen.textlength(prompt, font) > SIDE - 6:
            prompt = f"{prompt.rstrip('…')[:-1]}…"
        pen.text((LABEL + SIDE * (column + 0.5), CAPTION // 2), prompt, "black", font, anchor="mm")
    for row, way in enumerate(ways):
        top = CAPTION + tall * row
        pen.text((LABEL - 6, top + tall // 2), SHEET[way], "black", font, anchor="rm")
        resampling = Image.Resampling.NEAREST if way == PREVIEW else Image.Resampling.LANCZOS
        for column, image in enumerate(drawn.shown[way]):
            pixels = Image.fromarray((image * 255).round().byte().numpy())
            picture.paste(pixels.resize((SIDE, tall), resampling), (LABEL + SIDE * column, top))
    return picture


def _scaled(images: Tensor, size: Sequence[int]) -> Tensor:
    planes = rearrange(images, "b h w c -> b c h w")
    small = F.interpolate(planes, size=tuple(size), mode="bicubic", antialias=True).clamp(0, 1)
    return rearrange(small, "b c h w -> b h w c")
