"""The figures of a set of generated pictures, as a table, JSON and plot."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..plots import plotted
from .distances import LEAST, SPLITS, fid, inception_score, kid, precision_recall
from .extractors import Extractor
from .reading import Scored

TITLES = {"clip": "CLIP score", "pick": "PickScore", "top-1": "top-1"}  # of scores, by the names of their scorers
PAPERS = 10_000  # pictures of each set, below which FID says little


class Figure(NamedTuple):
    name: str
    value: float
    spread: float | None = None  # a standard deviation
    of: str = ""


def figures(generated: Scored, real: Scored | None, extractor: Extractor | None) -> Iterator[Figure]:
    """All figures that the scores of the two sets allow: those of the extractor's "features", and of TITLES."""
    if extractor is not None:
        yield from _of_features(generated.values["features"], real, extractor)
    for name, title in TITLES.items():
        if name in generated.values:
            yield Figure(title, *_mean(generated.values[name]), "deviation over pictures")


def least_pictures(compared: bool, extractor: Extractor | None) -> int:
    """How many generated pictures `figures` needs; `compared`: whether with real ones."""
    if extractor is None:
        return 1
    return max(LEAST if compared else 1, SPLITS if extractor.classifies else 1)


def _of_features(features: Tensor, real: Scored | None, extractor: Extractor) -> Iterator[Figure]:
    if real is not None:
        theirs = real.values["features"]
        yield Figure("FID", fid(theirs, features))
        yield Figure("KID", *kid(theirs, features), "deviation over subsets")
        precision, recall = precision_recall(theirs, features)
        yield Figure("precision", precision)
        yield Figure("recall", recall)
    with torch.inference_mode():
        logits = extractor.logits(features)
    if logits is not None:
        yield Figure("IS", *inception_score(logits), "deviation over splits")


def _mean(values: Tensor) -> tuple[float, float | None]:
    values = values.double()
    return values.mean().item(), values.std().item() if len(values) > 1 else None


def notes(generated: Scored, real: Scored | None, extractor: Extractor | None) -> Iterator[str]:
    """What a reader must know of the figures, one line each."""
    if extractor is not None:
        yield extractor.about
    sets = [generated] if real is None else [generated, real]
    if real is not None and min(len(one.keys) for one in sets) < PAPERS:
        yield (
            f"{len(generated.keys)} generated and {len(real.keys)} real pictures: FID is too high with few of them; "
            "compare only figures of equally many"
        )
    for one in sets:
        if one.skipped:
            yield f"{len(one.skipped)} pictures could not be read, such as {one.skipped[0]}"


def table(rows: Sequence[Figure]) -> Iterator[str]:
    yield "| figure | value | ± | |"
    yield "|---|---|---|---|"
    for row in rows:
        spread = "" if row.spread is None else f"{row.spread:.4g}"
        yield f"| {row.name} | {row.value:.4f} | {spread} | {row.of} |"


def plot(path: Path, rows: Sequence[Figure], title: str) -> None:
    """A panel per figure, since their scales differ."""
    with plotted(path, panels=len(rows), width=2.2, height=3.0) as panels:
        for panel, row in zip(panels, rows, strict=True):
            panel.bar([0], [row.value], yerr=row.spread, width=0.5, capsize=6)
            panel.set(title=row.name, xticks=[], xlim=(-0.6, 0.6), xlabel=f"{row.value:.4g}")
        panels[0].set_ylabel(title, parse_math=False)
