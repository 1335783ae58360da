"""Noise masks that no sampler follows: refused, unless they say nothing or Stage C has followed them."""

import pytest
import torch

from tests.nodes import comfyui_nodes as comfyui
from tests.nodes.inputs import noise


@pytest.fixture
def half():
    mask = torch.zeros(1, 128, 128)
    mask[..., :64] = 1
    return mask


def test_a_mask_set_after_stage_c_is_refused_by_stage_b(empty, stage_c, stage_b, half):
    with pytest.raises(ValueError, match="Stage B Sampler does not follow noise masks: set .* Stage C Sampler"):
        stage_b(comfyui.set_noise_mask(stage_c(empty()), half))
    masked = stage_c({**comfyui.set_noise_mask(empty(batch_size=2), half), "samples": noise(2, 16, 3, 3)})
    assert masked["noise_mask"].equal(half[:, None])  # a second pass of Stage C follows it too, as after KSampler
    with pytest.raises(ValueError, match="does not follow noise masks"):
        stage_b(comfyui.set_noise_mask(masked, 1 - half))


def test_a_mask_that_stage_c_followed_is_not(empty, stage_c, stage_b, half):
    masks = torch.cat([half, 1 - half])
    masked = stage_c({**comfyui.set_noise_mask(empty(batch_size=2), masks), "samples": noise(2, 16, 3, 3)})
    for latent in (masked, comfyui.from_batch(masked, 1), comfyui.repeat(masked, 2)):
        assert stage_b(latent)["samples"].isfinite().all()


def test_a_mask_of_ones_says_nothing(empty, stage_c, stage_b):
    for latent in comfyui.rebatch(stage_c(empty(batch_size=2))):
        assert stage_b(latent)["samples"].isfinite().all()


def test_a_mask_on_stage_as_latent_is_refused(run, loaded, half):
    latent = {"samples": noise(1, 4, 16, 16)}
    with pytest.raises(ValueError, match="Würstchen VQGAN Decode does not follow noise masks"):
        run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent=comfyui.set_noise_mask(latent, half))
    run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent=comfyui.set_noise_mask(latent, torch.ones(1, 8, 8)))
