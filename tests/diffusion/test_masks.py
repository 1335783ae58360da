"""Masked sampling: what is kept is blended into the predicted clean latent at every step."""

import math

import pytest
import torch

from tests.reference import predictor, signal
from wuerstchen_core import Geometry, Wuerstchen, WuerstchenError, pipeline
from wuerstchen_core.diffusion.guidance import keep_outside
from wuerstchen_core.diffusion.samplers import SAMPLERS
from wuerstchen_core.diffusion.schedule import sampling_times

MASKS = (0.1, 0.25, 0.5, 0.9)


def by_hand(sampler, x, times, latent, mask, noises):
    """ComfyUI's inpainting, step by step: blended in, and the clean latent that comes out blended again."""
    fixed, before = x, None
    for i, (t, u) in enumerate(zip(times, times[1:], strict=False)):
        a, b = signal(t), signal(u) if u > 0 else 1.0
        seen = mask * x + (1 - mask) * (math.sqrt(a) * latent + math.sqrt(1 - a) * fixed)
        clean = mask * (seen - math.sqrt(1 - a) * predictor(seen, t)) / math.sqrt(a) + (1 - mask) * latent
        aim = clean
        if sampler.startswith("dpmpp") and before is not None and u > 0:  # the second order of DDIM and DDPM
            aim = clean + (clean - before) * (log_snr(u) - log_snr(t)) / (log_snr(t) - log_snr(times[i - 1])) / 2
        if sampler in ("ddim", "dpmpp_2m"):
            x = math.sqrt(b) * aim + math.sqrt(1 - b) * (x - math.sqrt(a) * aim) / math.sqrt(1 - a)
        elif sampler == "lcm":
            x = math.sqrt(b) * clean + (math.sqrt(1 - b) * noises[i] if u > 0 else 0)
        else:  # the posterior of DDPM, equation 7 of arXiv 2006.11239
            share = a / b
            x = math.sqrt(b) * (1 - share) / (1 - a) * aim + math.sqrt(share) * (1 - b) / (1 - a) * x
            if u > 0:
                x = x + math.sqrt((1 - share) * (1 - b) / (1 - a)) * noises[i]
        before = clean
    return x, clean


def log_snr(t):
    return math.log(signal(t) / (1 - signal(t)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("value", [0.0, *MASKS, 1.0])
def test_a_mask_is_the_loop_by_hand(sampler, value):
    torch.manual_seed(0)
    start, latent = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    mask = torch.full((1, 1, 4, 4), value, dtype=torch.float64)
    mask[..., 2:] = 1 - value / 2
    noises = [torch.randn_like(start) for _ in range(6)]
    draws, states = iter(noises), []
    model = keep_outside(predictor, mask, latent, start)
    times = sampling_times(6)
    sampled = SAMPLERS[sampler](model, start, times, lambda: next(draws), states.append)
    expected, clean = by_hand(sampler, start, times, latent, mask, noises)
    torch.testing.assert_close(sampled, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states[-1]["clean"], clean, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def drawn():
    """The mini's Stage C, the states of a prompt and of the empty one, and a latent that it drew of them."""
    model = Wuerstchen.mini()
    texts = model.text_encoder_c(["rocket, noto style", ""]).split(1)
    latent = pipeline.sample_stage_c(model.stage_c, torch.zeros(1, 16, 6, 6), *texts, steps=10, seed=5)
    return model.stage_c, texts, latent


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_mask_of_any_value_keeps_the_latents_size(drawn, sampler):
    stage_c, texts, latent = drawn
    free = pipeline.sample_stage_c(stage_c, latent, *texts, steps=10, sampler=sampler).norm()
    for value in MASKS:
        mask = torch.full((1, 1, 6, 6), value)
        sampled = pipeline.sample_stage_c(stage_c, latent, *texts, steps=10, sampler=sampler, mask=mask)
        assert 0.8 < sampled.norm() / free < 1.2, value


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_previews_show_what_is_kept(drawn, sampler):
    stage_c, texts, latent = drawn
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 3:] = 1
    previews = []
    sampled = pipeline.sample_stage_c(
        stage_c, latent, *texts, steps=5, sampler=sampler, mask=mask, progress=lambda *told: previews.append(told[2])
    )
    assert len(previews) == 5 and torch.equal(sampled[..., :3], latent[..., :3])
    for preview in previews:
        torch.testing.assert_close(preview[..., :3], latent[..., :3], rtol=0, atol=1e-3)
        assert not torch.allclose(preview[..., 3:], latent[..., 3:], atol=0.1)


def test_masks_of_stage_b(tiny):
    latent, semantic, mask = torch.randn(1, 4, 32, 32), torch.randn(1, 16, 3, 3), torch.ones(1, 1, 32, 32)
    mask[..., :16] = 0
    sampled = pipeline.sample_stage_b(tiny.stage_b, semantic, Geometry(128, 128), latent=latent, mask=mask, steps=2)
    assert torch.equal(sampled[..., :16], latent[..., :16])
    assert not torch.allclose(sampled[..., 16:], latent[..., 16:])


@pytest.mark.parametrize(
    "mask, says",
    [
        (torch.ones(1, 6, 6), "shape"),
        (torch.ones(1, 1, 3, 3), "shape"),
        (torch.ones(2, 1, 6, 6), "shape"),
        (torch.full((1, 1, 6, 6), 1.5), "from 1.5 to 1.5"),
        (torch.full((1, 1, 6, 6), float("nan")), "nan"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(tiny, mask, says):
    text = tiny.text_encoder_c(["a cat"])
    with pytest.raises(WuerstchenError, match=f"mask has .*{says}"):
        pipeline.sample_stage_c(tiny.stage_c, torch.zeros(1, 16, 6, 6), text, cfg=1.0, steps=1, mask=mask)
