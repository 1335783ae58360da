"""Large pictures drawn by the mini in tiles and windows: as good as whole, and no border shows."""

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen_core import Geometry, Wuerstchen, pipeline, tiling
from wuerstchen_core.checkpoints.sets import MINI
from wuerstchen_core.mini.evaluation import psnr
from wuerstchen_core.mini.samples import CAPTION, COLUMNS, SIDE
from wuerstchen_core.models.stage_b import DiffNeXt

GEOMETRY, TILE = Geometry(512, 512), 256
BORDERS = TILE // 2  # windows see TILE pixels around squares of half the side


@pytest.fixture(scope="module")
def mini():
    return Wuerstchen.mini(dtype=torch.float32)


@pytest.fixture(scope="module")
def mosaic():
    """Four pictures of the card, (1, 512, 512, 3), moved so that the borders between them are none of tiles."""
    with Image.open(MINI.parent / "samples.png") as sheet:
        corners = [(number % COLUMNS * SIDE, number // COLUMNS * (SIDE + CAPTION)) for number in range(4)]
        cells = [np.array(sheet.crop((left, top, left + SIDE, top + SIDE))) for left, top in corners]
    whole = np.concatenate([np.concatenate(cells[:2], axis=1), np.concatenate(cells[2:], axis=1)])
    return torch.from_numpy(whole).float()[None].roll((77, 45), (1, 2)) / 255


@pytest.fixture(scope="module")
def draw(mini, mosaic):
    """tile -> the latent of Stage A that Stage B draws of the compressed mosaic"""
    semantic = pipeline.compress(mini.semantic_compressor, mosaic)
    return lambda tile: pipeline.sample_stage_b(mini.stage_b, semantic, GEOMETRY, steps=3, seed=1, tile=tile)


@pytest.fixture(scope="module")
def whole(mini, draw):
    return pipeline.decode(mini.stage_a, draw(0), tile=0)


def steepness(image, every):
    """Mean gradient across the lines between pixels at multiples of `every`, by that at other multiples of 32, at
    which the networks' own grids may show as well: once down, once across."""
    ratios = []
    for along in (1, 2):
        gradient = image.diff(dim=along).abs().mean(dim=[0, 3 - along, 3])
        lines = range(32, image.shape[along], 32)
        borders, others = ([gradient[line - 1] for line in lines if (line % every == 0) is at] for at in (True, False))
        ratios.append(torch.stack(borders).mean() / torch.stack(others).mean())
    return torch.stack(ratios)


def seams(image, whole):
    """How much steeper borders are than in the whole, where the same emoji are there."""
    return max((steepness(image, every) / steepness(whole, every)).max().item() for every in (BORDERS, TILE))


def test_windows_are_as_good_as_the_whole_and_do_not_show(mini, mosaic, draw, whole):
    windows = pipeline.decode(mini.stage_a, draw(TILE), tile=0)
    assert not torch.equal(windows, whole)
    assert psnr(windows, mosaic) > psnr(whole, mosaic) - 0.5
    assert seams(windows, whole) < 1.1


def test_quarters_drawn_by_themselves_would_show(mini, draw, whole, monkeypatch):
    condition, denoise = DiffNeXt.condition, DiffNeXt.denoise

    def quarters(planes):
        return [half for part in planes.chunk(2, dim=2) for half in part.chunk(2, dim=3)]

    def of_quarters(self, semantic, text, size, window):
        return [condition(self, part, text, [side // 2 for side in size]) for part in quarters(semantic)]

    def in_quarters(self, x, modulation, conditions):
        parts = [denoise(self, *given) for given in zip(quarters(x), [modulation] * 4, conditions, strict=True)]
        return torch.cat([torch.cat(parts[:2], dim=3), torch.cat(parts[2:], dim=3)], dim=2)

    monkeypatch.setattr(DiffNeXt, "condition", of_quarters)
    monkeypatch.setattr(DiffNeXt, "denoise", in_quarters)
    assert seams(pipeline.decode(mini.stage_a, draw(0), tile=0), whole) > 1.5


@pytest.mark.parametrize("reach, shows", [(None, False), (0, True)], ids=["overlapping", "side by side"])
def test_tiles_of_stage_a_show_only_without_an_overlap(mini, whole, draw, monkeypatch, reach, shows):
    if reach is not None:
        monkeypatch.setattr(tiling, "decoder_reach", lambda config: reach)
    tiles = pipeline.decode(mini.stage_a, draw(0), tile=TILE)
    assert (seams(tiles, whole) > 1.02) is shows
