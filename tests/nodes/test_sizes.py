"""The exact size of the picture after ComfyUI's own latent nodes: (height, width) that comes out of VQGAN Decode."""

import pytest
import torch

from tests.nodes import comfyui_nodes as comfyui
from tests.nodes.inputs import noise
from wuerstchen_core import Geometry


@pytest.fixture
def of_a(module):
    def latent(width, height):
        return module("nodes.latents").pack(noise(2, 4, *Geometry(width, height).stage_a), Geometry(width, height))

    return latent


@pytest.fixture
def size_c(module):
    def size(latent):
        with torch.inference_mode():
            geometry = module("nodes.latents").geometry_of_stage_c(latent)
        return geometry.height, geometry.width

    return size


@pytest.fixture
def size_a(module):
    def size(latent):
        with torch.inference_mode():
            geometry = module("nodes.latents").geometry_of_stage_a(latent)
        return None if geometry is None else (geometry.height, geometry.width)

    return size


SIZES = [(200, 256), (264, 128), (256, 256), (136, 200)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_turned_latent_is_of_the_turned_picture(of_c, of_a, size_c, size_a, width, height):
    for latent, size in ((of_c(width, height), size_c), (of_a(width, height), size_a)):
        for turns, expected in ((0, (height, width)), (1, (width, height)), (2, (height, width)), (3, (width, height))):
            found = size(comfyui.rotate(latent, turns))
            assert found == expected or (found is None and (width, height) == (256, 256))
        assert size(comfyui.rotate(comfyui.rotate(latent, 1), 1)) in ((height, width), None)
        assert size(comfyui.flip(comfyui.rotate(latent, 1), 2)) in ((width, height), None)


def test_what_follows_a_turn_does_not_turn_it_back(of_c, size_c):
    turned = comfyui.rotate(of_c(200, 256), 3)
    for after in (
        comfyui.blend(turned, of_c(256, 256), 0.3),
        comfyui.flip(turned, 3),
        comfyui.from_batch(turned, 1),
        comfyui.set_noise_mask(turned, torch.ones(1, 64, 64)),
        {**turned, "samples": turned["samples"].clone() * 0.5},
    ):
        assert size_c(after) == (200, 256)
    if of_c.drawn:  # the copy is in the usual order: the values tell
        assert size_c(comfyui.repeat(turned, 2)) == (200, 256)
        assert size_c(comfyui.from_batch(comfyui.repeat(comfyui.flip(turned, 2), 2), 1)) == (200, 256)


def test_a_flipped_or_mixed_latent_keeps_its_picture(of_c, of_a, size_c, size_a):
    for latent, size in ((of_c(200, 256), size_c), (of_a(200, 256), size_a)):
        other = {"samples": torch.randn_like(latent["samples"])}
        for after in (
            comfyui.flip(latent, 2),
            comfyui.flip(latent, 3),
            comfyui.blend(latent, other, 0.5),
            comfyui.blend(latent, other, 0.0),
            comfyui.repeat(latent, 3),
            comfyui.from_batch(latent, 1),
        ):
            assert size(after) == (256, 200)


@pytest.mark.parametrize(
    ("width", "height", "factor", "expected"),
    [(200, 256, 2, (512, 400)), (200, 256, 1.5, (384, 304)), (200, 256, 0.5, (128, 104)), (264, 128, 2, (256, 528)),
     (136, 200, 2, (400, 272)), (256, 256, 2, (512, 512))],
)  # fmt: skip
def test_a_resized_latent_is_of_the_resized_picture(of_c, size_c, width, height, factor, expected):
    """Rounded to 8 pixels."""
    for resize in (comfyui.upscale_by, comfyui.bislerp):
        assert size_c(resize(of_c(width, height), factor)) == expected


def test_a_resized_latent_of_stage_a_is_of_the_resized_picture(of_a, size_a):
    assert size_a(comfyui.upscale_by(of_a(200, 256), 2)) == (512, 400)
    assert size_a(comfyui.upscale_by(of_a(264, 128), 0.5)) == (64, 136)  # 132 is no multiple of 8
    assert size_a(comfyui.rotate(comfyui.upscale_by(of_a(200, 256), 2), 1)) == (400, 512)
    assert size_a(comfyui.upscale_by(of_a(256, 256), 2)) is None


def test_a_part_of_a_latent_is_the_picture_of_its_own_size(of_c, of_a, size_c, size_a):
    assert size_c(comfyui.crop(of_c(200, 256), slice(0, 3), slice(2, 5))) == (128, 128)
    assert size_c(comfyui.crop(of_c(400, 512), slice(3, 9), slice(0, 6))) == (256, 256)
    assert size_c(comfyui.crop(of_c(264, 128), slice(None), slice(2, 8))) == (128, 256)
    assert size_c(comfyui.crop(comfyui.upscale_by(of_c(200, 256), 2), slice(0, 6), slice(0, 6))) == (256, 256)
    assert size_a(comfyui.crop(of_a(200, 256), slice(3, 20), slice(5, 32))) is None
    if of_c.drawn:  # the copy is no view: the values tell
        part = comfyui.from_batch(comfyui.crop(of_c(400, 512), slice(3, 9), slice(0, 6)), 1)
        assert part["samples"].is_contiguous() and size_c(part) == (256, 256)
        assert size_c(comfyui.concat(of_c(200, 256), {"samples": noise(2, 16, 6, 6)}, 3)) == (256, 512)
        assert size_c(comfyui.concat({"samples": noise(2, 16, 6, 6)} | of_c(200, 256), of_c(200, 256), 2)) == (512, 256)


def test_a_size_that_was_lost_is_the_largest(of_c, of_a, size_c, size_a):
    for lost in (*comfyui.rebatch(of_c(200, 256)), comfyui.save_and_load(of_c(200, 256))):
        assert size_c(lost) == (256, 256)
    assert size_a(comfyui.save_and_load(of_a(200, 256))) is None
    assert size_c({**of_a(200, 256), "samples": noise(1, 16, 6, 6)}) == (256, 256)


def test_large_latents_that_were_meant_are_not(size_c, of_c, module):
    assert size_c(comfyui.upscale_by(of_c(200, 256), 4)) == (1024, 800)
    assert size_c({"samples": noise(1, 16, 32, 32)}) == (1344, 1344)
    assert size_c({"samples": torch.zeros(1, 16, 24, 24)}) == (1024, 1024)
    assert size_c(of_c(4096, 1536)) == (1536, 4096)
