"""What is compared with what, by the formulas in float64; the sheet has a row for each way of drawing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from tests.previewers import SMALL
from wuerstchen_core import Geometry, pipeline
from wuerstchen_core.models.previewer import Previewer
from wuerstchen_core.reports.evaluation import stages
from wuerstchen_core.reports.evaluation.extractors import Extractor

PROMPTS = [f"cat {number}" for number in range(5)]


class Means(Extractor):
    """The mean of each of the picture's quarters, red and green."""

    side, num_features, about = 8, 8, "means"

    def score(self, images, captions):
        return torch.stack(
            [image[:2].unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean(dim=(2, 4)) for image in images]
        ).flatten(1)


@pytest.fixture
def pictures(tiny, monkeypatch):
    """In the stages' place: known pictures, by prompt, text and noise; and the latents that they were drawn of."""
    chance = torch.Generator().manual_seed(0)
    with_text, without, other = (torch.rand(5, 64, 64, 3, generator=chance) for _ in range(3))
    previews = torch.rand(5, 24, 24, 3, generator=chance)

    def finish(model, latent, batch, geometry, options, with_text=True):
        return known["without" if not with_text else "other" if batch.seeds[0] >= 5 else "with"][batch.numbers]

    known = {"with": with_text, "without": without, "other": other, "preview": previews}
    monkeypatch.setattr(stages, "finish", finish)
    monkeypatch.setattr(stages, "draw_latent", lambda model, batch, *rest: torch.tensor(batch.numbers))
    monkeypatch.setattr(pipeline, "preview", lambda previewer, numbers: previews[numbers])
    return known


def psnr(one, another):
    return np.mean(
        [
            10 * np.log10(1 / np.square(a - b).mean())
            for a, b in zip(one.double().numpy(), another.double().numpy(), strict=True)
        ]
    )


def cosine(one, another):
    a, b = (Means().score(list(images.permute(0, 3, 1, 2)), []).double().numpy() for images in (one, another))
    return np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def frechet(one, another):
    a, b = (Means().score(list(images.permute(0, 3, 1, 2)), []).double().numpy() for images in (one, another))
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    mixed = sqrtm(covariances[0] @ covariances[1]).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * mixed)


def drawn(model, batch=8):
    return stages.draw(model, PROMPTS, Geometry(64, 64), model.sampling(steps_c=1, steps_b=1), Means(), batch)


def test_the_figures_are_those_of_the_pairs(tiny, pictures):
    found = drawn(replace(tiny, previewer=Previewer(SMALL)))
    planes = pictures["with"].permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(planes, size=(24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    small = small.permute(0, 2, 3, 1)
    preview = pictures["preview"]
    pairs = [
        (small, preview),
        (small, preview[[4, 0, 1, 2, 3]]),
        (pictures["without"], pictures["with"]),
        (pictures["other"], pictures["with"]),
    ]
    assert [row.name for row in found.rows] == list(stages.PAIRS)
    for row, (one, another) in zip(found.rows, pairs, strict=True):
        assert row.psnr == pytest.approx(psnr(one, another), abs=1e-5)
        assert row.cosine == pytest.approx(cosine(one, another), abs=1e-7)
        if "another" not in row.name:
            assert row.fid == pytest.approx(frechet(one, another), abs=1e-6)
    assert found.rows[1].fid is None
    real = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
    distances = stages.against(found, real)
    assert list(distances) == ["preview", "B + A with text", "B + A without text"]


def test_batches_change_nothing_but_which_preview_is_another_s(tiny, pictures):
    model = replace(tiny, previewer=Previewer(SMALL))
    for one, other in zip(drawn(model).rows, drawn(model, batch=2).rows, strict=True):
        if "another" not in one.name:
            assert (one.psnr, one.cosine, one.fid) == pytest.approx((other.psnr, other.cosine, other.fid), abs=1e-6)


def test_what_the_set_lacks_is_left_out_and_equal_pictures_are_told(tiny, pictures):
    pictures["other"][:] = pictures["with"]
    (row,) = drawn(replace(tiny, text_encoder_b=None)).rows
    assert "other noise" in row.name and row.psnr is None and row.cosine == pytest.approx(1)
    assert "| equal |" in list(stages.table([row]))[-1]


def test_the_sheet_has_a_row_for_each_way(tiny, pictures):
    found = drawn(replace(tiny, previewer=Previewer(SMALL)))
    picture = stages.sheet(found)
    assert picture.size == (stages.LABEL + 5 * stages.SIDE, stages.CAPTION + 3 * stages.SIDE)
    for row, way in enumerate(("preview", "with", "without")):
        box = (stages.LABEL + 2 * stages.SIDE, stages.CAPTION + row * stages.SIDE)
        tile = np.asarray(picture.crop((*box, box[0] + stages.SIDE, box[1] + stages.SIDE)))
        assert tile.mean(axis=(0, 1)) / 255 == pytest.approx(pictures[way][2].mean(dim=(0, 1)).numpy(), abs=0.01)


def test_pickscore_counts_the_pictures_that_are_better_without_text(tiny, pictures):
    pictures["with"][:2] *= 0.5  # the brighter picture is preferred
    pictures["without"][2:] *= 0.5
    pictures["without"][4] = pictures["with"][4]

    def brighter(images, captions):
        assert all(caption.startswith("cat") for caption in captions)
        return torch.stack([image.mean() for image in images])

    sampling = tiny.sampling(steps_c=1, steps_b=1)
    found = stages.draw(tiny, PROMPTS, Geometry(64, 64), sampling, Means(), 2, pick=brighter)
    assert stages.preferred(found).rate == (2 + 0.5) / 5
    assert stages.preferred(drawn(tiny)) is None
