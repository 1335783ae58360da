"""Buckets, and pictures scaled and cut to them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import picture
from wuerstchen_core import WuerstchenError
from wuerstchen_core.training.data.buckets import bucket_sizes, crop_and_resize, nearest_size


def test_buckets_have_about_one_area_and_sides_of_64():
    assert bucket_sizes(256) == [(384, 192), (320, 192), (256, 256), (192, 320), (192, 384)]
    assert bucket_sizes(512) == [
        (704, 384), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640), (384, 704)
    ]  # fmt: skip
    for size in (64, 128, 384, 768, 1024):
        sizes = bucket_sizes(size)
        assert (size, size) in sizes and {(w, h) for h, w in sizes} == set(sizes)
        for h, w in sizes:
            assert h % 64 == w % 64 == 0 and max(h, w) <= 2 * min(h, w)
            assert 0.85 < h * w / size**2 < 1.15
    with pytest.raises(WuerstchenError, match="size is 200: with buckets it must be a multiple of 64"):
        bucket_sizes(200)


def test_the_nearest_ratio_is_nearest_as_ratios_compare():
    sizes = [(64, 128), (64, 64), (128, 64)]
    root = math.sqrt(2)
    assert nearest_size(sizes, (100, 99)) == (64, 64) and nearest_size(sizes, (10, 1000)) == (64, 128)
    assert nearest_size(sizes, (1000, round(1000 * root) - 1)) == (64, 64)
    assert nearest_size(sizes, (1000, round(1000 * root) + 1)) == (64, 128)
    assert nearest_size(sizes, (round(1000 * root) + 1, 1000)) == (128, 64)


@pytest.mark.parametrize("shape, box", [((120, 96), (0, 12, 96, 108)), ((96, 120), (12, 0, 108, 96)), ((40, 40), None)])
def test_a_picture_is_scaled_as_pillow_does_and_its_middle_kept(shape, box):
    pixels = picture(3, shape)
    planes = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    expected = np.stack([np.array(plane.crop(box).resize((64, 64), Image.Resampling.BICUBIC)) for plane in planes])
    fitted = crop_and_resize(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, (64, 64))
    torch.testing.assert_close(fitted, torch.from_numpy(expected / 255).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_picture_of_the_right_size_is_left_alone_and_a_thread_of_one_is_no_trouble():
    image = torch.rand(3, 128, 64)
    assert torch.equal(crop_and_resize(image, (128, 64)), image)
    assert crop_and_resize(torch.rand(3, 30000, 1), (64, 128)).shape == (3, 64, 128)  # scaled whole it would take 88 GB
