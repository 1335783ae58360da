"""Figures of two sets of features: FID, KID, precision and recall; of one set of logits: the Inception Score; of pairs
of pictures: PSNR."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...util.errors import WuerstchenError, readable

NEIGHBOURS = 3  # of precision and recall
SUBSETS, SUBSET = 100, 1000  # of KID
SPLITS = 10  # of the Inception Score
LEAST = 4  # pictures of each set that KID, precision and recall need
ROWS = 1024  # pictures whose distances to all others are in memory at once


class Spread(NamedTuple):
    mean: float
    deviation: float


class Given(nn.Module):
    """What torchmetrics takes for a network: the features are computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(real: Tensor, generated: Tensor) -> float:
    """The Fréchet distance of two sets of features (N, F) and (M, F) (arXiv 1706.08500), in float64.

    Raises WuerstchenError if a set has fewer than 2 pictures, or torchmetrics is missing.
    """
    _check(real, generated)
    with _torchmetrics():
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(Given(real.shape[1])).set_dtype(torch.float64)
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        return metric.compute().item()


def kid(real: Tensor, generated: Tensor, subsets: int = SUBSETS, subset: int | None = None) -> Spread:
    """The kernel distance of two sets of features (arXiv 1801.01401): mean and deviation over random subsets.

    Subsets have 1000 pictures or, where there are fewer than 2000, half of the smaller set; they are the same each
    time. Raises WuerstchenError if a set has fewer than 4 pictures, or torchmetrics is missing.
    """
    least = min(len(real), len(generated))
    _check(real, generated, LEAST)
    with _torchmetrics():
        from torchmetrics.image.kid import KernelInceptionDistance

        metric = KernelInceptionDistance(
            Given(real.shape[1]), subsets=subsets, subset_size=subset or min(SUBSET, least // 2)
        )
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        return Spread(*(value.item() for value in metric.compute()))


def inception_score(logits: Tensor) -> Spread:
    """The Inception Score of logits (N, classes) (arXiv 1606.03498): mean and deviation over 10 splits.

    Raises WuerstchenError if there are fewer than 10 pictures, or torchmetrics is missing.
    """
    if len(logits) < SPLITS:
        raise WuerstchenError(f"{len(logits)} pictures: the Inception Score needs at least {SPLITS}")
    with _torchmetrics():
        from torchmetrics.image.inception import InceptionScore

        metric = InceptionScore(Given(logits.shape[1]), splits=SPLITS)
        metric.update(logits.double())
        return Spread(*(value.item() for value in metric.compute()))


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): shares of pictures within the other set's neighbourhoods.

    A neighbourhood reaches from a picture of a set to its k-th nearest neighbour in it.

    Raises WuerstchenError if a set has not more than `neighbours` pictures.
    """
    _check(real, generated, neighbours + 1)
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    points, centres = points.double(), centres.double()
    radii = torch.cat(
        [_distances(rows, centres).kthvalue(neighbours + 1, dim=1).values for rows in centres.split(ROWS)]
    )
    inside = [(_distances(rows, centres) <= radii).any(dim=1) for rows in points.split(ROWS)]
    return torch.cat(inside).double().mean().item()


def _distances(ones: Tensor, others: Tensor) -> Tensor:
    return torch.cdist(ones, others, compute_mode="donot_use_mm_for_euclid_dist")


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """(B, H, W, 3) in [0, 1] -> peak signal-to-noise ratio of each in dB (B,); infinite where they are equal"""
    return -10 * (images - truth).square().flatten(1).mean(dim=1).log10()


def _check(real: Tensor, generated: Tensor, least: int = 2) -> None:
    if min(len(real), len(generated)) < least:
        raise WuerstchenError(
            f"{len(generated)} generated and {len(real)} real pictures: this figure needs at least {least} of each"
        )


@contextmanager
def _torchmetrics() -> Iterator[None]:
    """The same random subsets each time, and none of its advice on memory."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    except ImportError as error:
        raise WuerstchenError(
            f"measuring needs torchmetrics, which can't be imported ({readable(error)}): pip install -e '.[measure]'"
        ) from error
