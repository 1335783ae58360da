"""Every size of the interface's range has latents that the networks take, and comes out as asked."""

import math

import pytest

from wuerstchen_core import Geometry, WuerstchenError

SIDES = range(256, 4097, 8)  # of pictures, in pixels


@pytest.mark.parametrize(
    "side, work, stage_a, stage_c, compressor",
    [
        (1024, 1024, 256, 24, 768),
        (512, 512, 128, 12, 384),
        (256, 256, 64, 6, 192),
        (264, 320, 80, 8, 256),
    ],
)
def test_published_sizes(side, work, stage_a, stage_c, compressor):
    geometry = Geometry(width=side, height=256)
    sizes = geometry.work[1], geometry.stage_a[1], geometry.stage_c[1], geometry.compressor[1]
    assert sizes == (work, stage_a, stage_c, compressor)
    assert geometry.work[0] == 256


@pytest.mark.parametrize("side", SIDES)
def test_any_multiple_of_8(side):
    geometry = Geometry(side, 256)
    left, right, top, bottom = geometry.margins
    assert geometry.work[1] % 64 == 0 and 0 <= geometry.work[1] - side < 64
    assert left + side + right == geometry.work[1] and abs(left - right) <= 1 and top == bottom == 0
    assert geometry.stage_c[1] == math.ceil(geometry.work[1] / (1024 / 24))
    assert geometry.stage_a[1] % 16 == 0
    assert geometry.compressor[1] == 32 * geometry.stage_c[1]  # what a picture is compressed to, Stage C's latent is
    assert 4 * geometry.stage_a[1] == geometry.work[1]  # what is decoded, and the margins are cut from
    assert Geometry.of_stage_c(*geometry.stage_c).work == geometry.work


@pytest.mark.parametrize("height", range(256, 4097, 320))
def test_width_and_height_are_each_their_own(height):
    """What holds for every side holds for every pair of sides."""
    tall = Geometry(256, height)
    for width in SIDES:
        geometry, wide = Geometry(width, height), Geometry(width, 256)
        for name in ("work", "stage_a", "stage_c", "compressor"):
            assert getattr(geometry, name) == (getattr(tall, name)[0], getattr(wide, name)[1])
        assert geometry.margins == (*wide.margins[:2], *tall.margins[2:])


def test_height_comes_first_in_latents():
    geometry = Geometry(width=512, height=256)
    assert geometry.stage_c == (6, 12) and geometry.stage_a == (64, 128)


@pytest.mark.parametrize("width, height", [(250, 256), (256, 0), (-8, 256), (256, 100_000)])
def test_other_sizes_are_named(width, height):
    with pytest.raises(WuerstchenError, match="width is|height is"):
        Geometry(width, height)
