"""What each operation does to a picture, and FID after it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from wuerstchen_core.reports.evaluation.distances import fid
from wuerstchen_core.reports.evaluation.extractors import load_compressor_features
from wuerstchen_core.reports.evaluation.robustness import OPERATIONS, changed, robustness


def drawing(number, side=128):
    """Discs in colours of their own on a coloured ground."""
    chance = np.random.default_rng(number)
    image = Image.new("RGB", (side, side), tuple(chance.integers(80, 220, 3).tolist()))
    for _ in range(6):
        x, y, radius = chance.integers(10, side - 10, 3).tolist()
        radius = 5 + radius // 4
        fill = tuple(chance.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return image


IMAGE = torch.from_numpy(np.random.default_rng(0).integers(40, 200, (3, 46, 61), dtype=np.uint8)) / 255


def after(name, image=IMAGE):
    return (changed(image, OPERATIONS[name]) * 255).numpy()


def test_every_operation_keeps_the_size_and_changes_something():
    for name in OPERATIONS:
        assert after(name).shape == IMAGE.shape and np.abs(after(name) - IMAGE.numpy() * 255).mean() > 0.1, name


def test_nothing_else_happens_to_a_picture():
    assert torch.equal(changed(IMAGE, lambda picture: picture), IMAGE)


@pytest.mark.parametrize("sign, factor", [("+", 1.1), ("-", 0.9)])
def test_brightness_and_contrast_by_their_formulas(sign, factor):
    before = IMAGE.numpy().astype(np.float64) * 255
    assert np.abs(after(f"brightness {sign}10 %") - before * factor).max() <= 1
    grey = np.tensordot([0.299, 0.587, 0.114], before, 1).mean()
    assert np.abs(after(f"contrast {sign}10 %") - (grey + (before - grey) * factor)).max() <= 2


def test_a_palette_has_256_colours_and_nearest_repeats_pixels():
    assert len(np.unique(after("palette of 8 bits").reshape(3, -1), axis=1).T) <= 256 < 46 * 61
    even = IMAGE[:, :, :60]
    blocks = after("nearest", even).reshape(3, 23, 2, 30, 2)
    assert (blocks == blocks[:, :, :1, :, :1]).all() and np.isin(blocks, even.numpy() * 255).all()
    constant = torch.full((3, 16, 16), 0.2)
    assert (after("bilinear", constant) == 51).all()


def test_jpeg_errs_more_the_lower_its_quality():
    errors = [np.square(after(f"JPEG {quality}") - IMAGE.numpy() * 255).mean() for quality in (95, 90, 80, 70, 60, 50)]
    assert errors == sorted(errors) and errors[0] > 0


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    for number in range(6):
        drawing(number).save(folder / f"{number:02}.png")
    return folder


def test_fid_is_that_of_the_features_before_and_after(drawings):
    extractor = load_compressor_features()
    found, count = robustness(drawings, extractor, batch=8)
    images = [torch.from_numpy(np.asarray(drawing(number))).permute(2, 0, 1) / 255 for number in range(6)]
    names = [""] * 6
    before = extractor.score(images, names)
    again = extractor.score([changed(image, OPERATIONS["JPEG 50"]) for image in images], names)
    assert count == 6 and found["JPEG 50"] == pytest.approx(fid(before, again), rel=1e-3)
    assert found["JPEG 50"] > found["JPEG 80"] > found["JPEG 95"] > 0
