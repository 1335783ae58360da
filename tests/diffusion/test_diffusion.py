"""Schedule, samplers and guidance against formulas in float64 and diffusers' scheduler."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from tests.reference import predictor, signal
from wuerstchen_core.diffusion.guidance import guide, keep_outside, prepare
from wuerstchen_core.diffusion.samplers import sample_ddim, sample_ddpm
from wuerstchen_core.diffusion.schedule import add_noise, alpha_bar, sampling_times
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.util.errors import WuerstchenError


def ignore(state):
    pass


def test_alpha_bar_is_the_clamped_cosine():
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = torch.tensor([signal(t) for t in times.tolist()], dtype=torch.float64)
    torch.testing.assert_close(alpha_bar(times), expected, rtol=1e-12, atol=0)
    assert alpha_bar(times)[0] == 0.9999 and alpha_bar(times)[-1] == 1e-4


def test_add_noise_keeps_the_variance():
    clean, noise = torch.full((2, 3), 2.0), torch.full((2, 3), 5.0)
    noisy = add_noise(clean, noise, torch.tensor([0.2, 0.7]))
    for row, t in zip(noisy, (0.2, 0.7), strict=True):
        assert row[0].item() == pytest.approx(math.sqrt(signal(t)) * 2 + math.sqrt(1 - signal(t)) * 5, rel=1e-6)


def test_released_uneven_times():
    first, second = torch.linspace(1, 2 / 3, 20), torch.linspace(2 / 3, 0, 11)[1:]
    assert sampling_times(29, "uneven") == pytest.approx(torch.cat([first, second]).tolist(), abs=1e-6)


@pytest.mark.parametrize("schedule", ["even", "uneven"])
@pytest.mark.parametrize("denoise", [1.0, 0.8, 0.3])
def test_times_fall_from_denoise_to_zero(schedule, denoise):
    times = sampling_times(7, schedule, denoise)
    assert len(times) == 8
    assert times[0] == pytest.approx(denoise) and times[-1] == 0
    assert all(t > u for t, u in pairwise(times))


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 3, "denoise": 1.1}, {"steps": 3, "schedule": "odd"}])
def test_bad_options_are_named(options):
    with pytest.raises(WuerstchenError, match="steps|denoise|odd"):
        sampling_times(**options)


def test_ddpm_is_diffusers_scheduler():
    times = sampling_times(9)
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))
    drawn = sample_ddpm(predictor, start, times, lambda: torch.randn(start.shape, generator=ours), ignore)

    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(timesteps=times)
    x = start
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(predictor(x, t), t.expand(2), x, generator=theirs).prev_sample
    torch.testing.assert_close(drawn, x, rtol=1e-5, atol=1e-5)


def test_samplers_are_their_formulas_in_float64():
    times = sampling_times(6, "uneven", denoise=0.9)
    torch.manual_seed(3)
    start = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    noises = [torch.randn_like(start) for _ in times]

    ddpm, ddim = start, start
    for t, u, z in zip(times, times[1:], noises, strict=False):
        alpha = signal(t) / signal(u)
        mean = (ddpm - (1 - alpha) * predictor(ddpm, t) / math.sqrt(1 - signal(t))) / math.sqrt(alpha)
        spread = math.sqrt((1 - alpha) * (1 - signal(u)) / (1 - signal(t)))
        ddpm = mean + (spread * z if u > 0 else 0)
        e = predictor(ddim, t)
        clean = (ddim - math.sqrt(1 - signal(t)) * e) / math.sqrt(signal(t))
        ddim = math.sqrt(signal(u)) * clean + math.sqrt(1 - signal(u)) * e

    draws = iter(noises)
    ours = sample_ddpm(predictor, start, times, lambda: next(draws), ignore)
    torch.testing.assert_close(ours, ddpm, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sample_ddim(predictor, start, times, None, ignore), ddim, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [sample_ddpm, sample_ddim])
def test_a_perfect_predictor_leads_to_the_clean_latent(sampler):
    clean, start = torch.full((1, 1, 2, 2), 0.7), torch.randn(1, 1, 2, 2)
    seen = []

    def oracle(x, t):
        return (x - math.sqrt(signal(t)) * clean) / math.sqrt(1 - signal(t))

    times = sampling_times(8)

    def watch(state):
        seen.append(state["step"])
        assert set(state) == {"step", "t", "sigma", "x", "clean"} and state["t"] == times[state["step"] - 1]
        at_t = signal(state["t"])
        assert state["sigma"] == pytest.approx(math.sqrt((1 - at_t) / at_t))
        torch.testing.assert_close(state["clean"], clean, rtol=0, atol=2e-3)
        noise = oracle(state["x"], state["t"])
        torch.testing.assert_close(
            state["x"], math.sqrt(at_t) * state["clean"] + math.sqrt(1 - at_t) * noise, rtol=0, atol=1e-4
        )

    drawn = sampler(oracle, start, times, lambda: torch.randn(1, 1, 2, 2), watch)
    assert seen == list(range(1, 9))
    torch.testing.assert_close(drawn, clean, rtol=0, atol=0.05)  # alpha_bar(0) is 0.9999, not 1


def test_guidance_goes_from_the_second_half_to_the_first():
    def halves(x, t):
        assert x.shape[0] == 4
        return torch.cat([torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)])

    assert guide(halves, 4.0)(torch.zeros(2, 1), 0.5).tolist() == [[9.0], [9.0]]


def test_outside_of_the_mask_the_model_sees_the_latent_with_noise():
    latent, noise, x = torch.full((1, 1, 1, 2), 2.0), torch.full((1, 1, 1, 2), -1.0), torch.full((1, 1, 1, 2), 9.0)
    mask = torch.tensor([[[[0.0, 1.0]]]])
    seen = []
    keep_outside(lambda x, t: seen.append(x) or x, mask, latent, noise)(x, 0.6)
    expected = math.sqrt(signal(0.6)) * 2 - math.sqrt(1 - signal(0.6))
    assert seen[0].flatten().tolist() == pytest.approx([expected, 9.0], rel=1e-6)


@torch.no_grad()
def test_what_is_prepared_once_is_what_every_step_would_compute():
    torch.manual_seed(4)
    network = DiffNeXt(
        StageBConfig(
            widths=(16, 32), heads=(0, 2), blocks=(1, 1), semantic=(False, True), condition_width=24, text_width=20
        )
    ).eval()
    x, semantic, text = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 2, 2), torch.randn(2, 7, 20)
    times = sampling_times(3)
    model = prepare(network, network.condition(semantic, text, (16, 16)), times, "cpu", torch.float32)
    for t in times[:-1]:
        torch.testing.assert_close(model(x, t), network(x, torch.full((2,), t), semantic, text))
