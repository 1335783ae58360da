"""Where a noise mask lies on the latent."""

import torch

from tests.nodes import comfyui_nodes as comfyui
from tests.nodes.inputs import noise
from wuerstchen_core import Geometry


def test_the_mask_of_an_enlarged_latent_lies_on_its_picture(module):
    """400 pixels lie in the middle of 512 after 200 in the middle of 256: their left half ends at 256, position 6."""
    latent = module("nodes.latents").pack(noise(1, 16, 6, 6), module("nodes.latents").picture_size(200, 256))
    mask = torch.zeros(1, 512, 400)
    mask[..., :200] = 1
    latent = comfyui.set_noise_mask(comfyui.upscale_by(latent, 2), mask)
    geometry = module("nodes.latents").geometry_of_stage_c(latent)
    row = module("nodes.latents").mask_of(latent, geometry)[0, 0, 5]
    torch.testing.assert_close(row, torch.tensor([1.0] * 6 + [0.0] * 6), atol=0.02, rtol=0)


def test_the_mask_is_cut_as_the_picture_was(module):
    """A wide picture that is compressed to a square loses its sides, and so does its mask."""
    mask = torch.zeros(1, 1, 256, 1024)
    mask[..., :128, 384:512] = 1  # what the middle of the picture has at its top left
    latent = {"samples": torch.zeros(1, 16, 6, 6), "noise_mask": mask}
    cut = module("nodes.latents").mask_of(latent, Geometry(256, 256))
    expected = torch.zeros(1, 1, 6, 6)
    expected[..., :3, :3] = 1
    torch.testing.assert_close(cut, expected, atol=0.05, rtol=0)


def test_the_mask_lies_where_the_picture_lies(module):
    """136 pixels lie in the middle of the 192 that the networks work on: their left quarter ends at 62."""
    mask = torch.zeros(1, 1, 200, 136)
    mask[..., :34] = 1
    latent = {"samples": torch.zeros(1, 16, 6, 5), "noise_mask": mask}
    columns = module("nodes.latents").mask_of(latent, Geometry(136, 200))[0, 0, 3]
    torch.testing.assert_close(columns, torch.tensor([1, 62 * 5 / 192 - 1, 0, 0, 0]), atol=0.02, rtol=0)
