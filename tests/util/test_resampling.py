"""Fitting a picture into a size: what scaling the whole and cutting out its middle gives, at no more memory."""

import resource

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from wuerstchen_core import Geometry
from wuerstchen_core.pipeline import fit


def whole(image, geometry):
    height, width = image.shape[1:3]
    scale = max(geometry.height / height, geometry.width / width)
    size = max(geometry.height, round(height * scale)), max(geometry.width, round(width * scale))
    planes = F.interpolate(rearrange(image, "b h w c -> b c h w"), size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - geometry.height) // 2, (size[1] - geometry.width) // 2
    planes = planes.clamp(0, 1)[:, :, top : top + geometry.height, left : left + geometry.width]
    return rearrange(planes, "b c h w -> b h w c")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "height, width, geometry",
    [
        (256, 256, Geometry(256, 256)),
        (200, 333, Geometry(256, 256)),
        (900, 700, Geometry(256, 264)),
        (500, 60, Geometry(128, 64)),
        (5, 300, Geometry(64, 128)),
        (3, 3, Geometry(64, 72)),
        (512, 512, Geometry(8, 8)),
        (1, 40, Geometry(64, 64)),
    ],
)
def test_it_is_the_middle_of_the_whole(height, width, geometry, channels):
    torch.manual_seed(0)
    image = torch.rand(2, height, width, channels)
    fitted = fit(image, geometry)
    assert fitted.shape == (2, geometry.height, geometry.width, channels)
    torch.testing.assert_close(fitted, whole(image, geometry), rtol=0, atol=2e-4)


def test_what_fits_already_is_not_changed():
    image = torch.rand(1, 128, 192, 3)
    assert torch.equal(fit(image, Geometry(192, 128)), image)


@pytest.mark.parametrize("height, width", [(1, 20_000), (20_000, 2)])
def test_a_thin_picture_takes_no_more_memory_than_another(height, width):
    image = torch.rand(1, height, width, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fitted = fit(image, Geometry(1024, 1024))
    assert fitted.shape == (1, 1024, 1024, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; the whole would be 250 GB
