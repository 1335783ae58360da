"""Every size of the interface's range has latents that the networks take, and comes out as asked."""

import math

import pytest

from wuerstchen_core import Geometry, WuerstchenError


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


@pytest.mark.parametrize("side", range(256, 4097, 8))
def test_any_multiple_of_8(side):
    geometry = Geometry(side, 256)
    left, right, top, bottom = geometry.margins
    assert geometry.work[1] % 64 == 0 and 0 <= geometry.work[1] - side < 64
    assert left + side + right == geometry.work[1] and abs(left - right) <= 1 and top == bottom == 0
    assert geometry.stage_c[1] == math.ceil(geometry.work[1] / (1024 / 24))
    assert geometry.stage_a[1] % 16 == 0
    assert Geometry.of_stage_c(*geometry.stage_c).work == geometry.work


def test_height_comes_first_in_latents():
    geometry = Geometry(width=512, height=256)
    assert geometry.stage_c == (6, 12) and geometry.stage_a == (64, 128)


@pytest.mark.parametrize("width, height", [(250, 256), (256, 0), (-8, 256), (256, 100_000)])
def test_other_sizes_are_named(width, height):
    with pytest.raises(WuerstchenError, match="width is|height is"):
        Geometry(width, height)
