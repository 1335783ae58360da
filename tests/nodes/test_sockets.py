"""Sizes out of range: one clear error."""

import pytest
import torch

from tests.nodes import comfyui_nodes as comfyui


@pytest.mark.parametrize("side", [120, 130, -8, 4104, 8192])
@pytest.mark.parametrize("name", ["width", "height"])
def test_a_size_out_of_the_nodes_range_is_told_with_that_range(empty, name, side):
    sizes = {"width": 256, "height": 256, name: side}
    message = f"{name} is {side}: it must be a multiple of 8 from 128 to 4096"
    with pytest.raises(ValueError, match=message):
        empty(**sizes)


@pytest.mark.parametrize("name", ["width", "height"])
def test_one_side_alone_cannot_be_the_models_own(empty, name):
    with pytest.raises(ValueError, match=f"{name} is 0, the model's own size, but .* is not: set both, or both to 0"):
        empty(**{"width": 256, "height": 256, name: 0})


def test_a_latent_without_a_size_waits_for_stage_c(empty, module):
    latents = module("nodes.latents")
    latent = empty(width=0, height=0, batch_size=3)
    for of in (latent, {"samples": latent["samples"]}):  # RebatchLatents keeps no more
        with pytest.raises(ValueError, match="no size yet"):
            latents.geometry_of_stage_c(of)
    mask = {"noise_mask": torch.ones(1, 64, 64), "batch_index": [4, 5, 6]}
    sized = latents.sized({**latent, **mask}, 1024)
    assert sized["samples"].shape == (3, 16, 24, 24) and not sized["samples"].any()
    assert sized["noise_mask"] is mask["noise_mask"] and sized["batch_index"] == [4, 5, 6]
    geometry = latents.geometry_of_stage_c(sized)
    assert (geometry.width, geometry.height) == (1024, 1024)
    given = empty(width=264, height=128)
    assert latents.sized(given, 1024) is given
    with pytest.raises(ValueError, match="resized before it had a size"):
        latents.sized(comfyui.upscale_by(latent, 4), 1024)


def test_an_empty_batch_is_refused(empty):
    with pytest.raises(ValueError, match="batch_size is 0"):
        empty(batch_size=0)
