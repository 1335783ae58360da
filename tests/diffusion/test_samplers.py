"""Samplers against formulas in float64, against data whose ideal predictor is known, and where times lie too close."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from tests.reference import predictor, signal
from wuerstchen_core.diffusion.samplers import SAMPLERS, sample_ddim, sample_ddpm, sample_dpmpp_2m, sample_dpmpp_2m_sde
from wuerstchen_core.diffusion.schedule import MAX_STEPS, add_noise, sampling_times

MEAN, SPREAD = 0.6, 0.5  # of the data of `ideal`
GRIDS = [
    (1, "even", 1.0),
    (2, "even", 1.0),
    (3, "even", 0.4),
    (7, "uneven", 1.0),
    (9, "uneven", 0.8),
    (12, "even", 1.0),
]


def ignore(state):
    pass


def sigma_at(t):
    return math.sqrt((1 - signal(t)) / signal(t))


def ideal(x, t):
    """The noise in x that is to be expected if clean numbers are normal, of mean MEAN and deviation SPREAD."""
    share = signal(t)
    clean = MEAN + SPREAD**2 * share**0.5 / (SPREAD**2 * share + 1 - share) * (x - share**0.5 * MEAN)
    return (x - share**0.5 * clean) / (1 - share) ** 0.5


def noises(like, count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(like.shape, generator=generator, dtype=like.dtype) for _ in range(count)]


def by_hand(name, x, times, drawn):
    """The formulas of k-diffusion: x / sqrt(alpha_bar), which has the noise sigma, on log(1 / sigma)."""
    x, drawn, before = x / signal(times[0]) ** 0.5, iter(drawn), None
    sigmas = [*map(sigma_at, times[:-1]), 0.0]
    for i, (s, u) in enumerate(pairwise(sigmas)):
        scale = signal(times[i]) ** 0.5
        clean = x - s * predictor(x * scale, times[i])
        if u == 0:
            return clean
        if name == "ddim":
            x = x + (x - clean) / s * (u - s)  # Euler's step of the ODE
        elif name == "ddpm":
            up = math.sqrt(u**2 * (s**2 - u**2) / s**2)
            x = clean + math.sqrt(u**2 - up**2) * (x - clean) / s + up * next(drawn)
        else:
            h = math.log(s / u)
            slope = 0.0 if before is None else (clean - before) * h / (2 * math.log(sigmas[i - 1] / s))
            if name == "dpmpp_2m":
                x = u / s * x - math.expm1(-h) * (clean + slope)
            else:
                x = u / s * math.exp(-h) * x - math.expm1(-2 * h) * (clean + slope)
                x = x + u * math.sqrt(-math.expm1(-2 * h)) * next(drawn)
        before = clean


@pytest.mark.parametrize("steps, schedule, denoise", GRIDS)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"])
def test_samplers_are_their_formulas_in_float64(name, steps, schedule, denoise):
    times = sampling_times(steps, schedule, denoise)
    start, *drawn = noises(torch.zeros(1, 2, 3, 3, dtype=torch.float64), steps)
    draws = iter(drawn)
    ours = SAMPLERS[name](predictor, start, times, lambda: next(draws), ignore)
    torch.testing.assert_close(ours, by_hand(name, start, times, drawn), rtol=1e-10, atol=1e-10)


def test_ddpm_is_diffusers_scheduler():
    """All but the last step, at whose end diffusers leaves the noise of alpha_bar(0) = 0.9999."""
    times = sampling_times(9)
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))
    states = []
    sample_ddpm(predictor, start, times, lambda: torch.randn(start.shape, generator=ours), states.append)

    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(timesteps=times)
    x = start
    for t, state in zip(scheduler.timesteps[:-1], states, strict=True):
        torch.testing.assert_close(state["x"], x, rtol=1e-5, atol=1e-5)
        x = scheduler.step(predictor(x, t), t.expand(2), x, generator=theirs).prev_sample


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
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
        assert state["sigma"] == pytest.approx(sigma_at(state["t"]))
        torch.testing.assert_close(state["clean"], clean, rtol=0, atol=2e-3)
        noise = oracle(state["x"], state["t"])
        torch.testing.assert_close(
            state["x"], math.sqrt(at_t) * state["clean"] + math.sqrt(1 - at_t) * noise, rtol=0, atol=1e-4
        )

    drawn = sampler(oracle, start, times, lambda: torch.randn(1, 1, 2, 2), watch)
    assert seen == list(range(1, 9))
    torch.testing.assert_close(drawn, clean, rtol=0, atol=1e-5)  # no noise is left


def error(sampler, steps):
    """Of a run on `ideal` along the ODE, whose solution keeps its place among what is normal at that noise level."""
    start = torch.tensor([1.5], dtype=torch.float64)
    times = sampling_times(steps, denoise=0.9)
    place = (start / signal(0.9) ** 0.5 - MEAN) / math.hypot(SPREAD, sigma_at(0.9))
    return abs(sampler(ideal, start, times, None, ignore) - (MEAN + SPREAD * place)).item()


def test_the_orders_of_convergence():
    for sampler, order in ((sample_ddim, 1), (sample_dpmpp_2m, 2)):
        coarse, fine = (error(sampler, steps) for steps in (10, 160))
        assert math.log(coarse / fine, 16) == pytest.approx(order, abs=0.25)
    assert error(sample_dpmpp_2m, 10) < error(sample_ddim, 10) / 3


def deviation(sampler, steps):
    """Of what a stochastic sampler draws from `ideal`: it is linear, so that each draw's share can be read off."""
    times = sampling_times(steps)
    inputs = iter(torch.eye(steps + 1, dtype=torch.float64))
    shares = sampler(ideal, next(inputs), times, lambda: next(inputs), ignore)
    nothing = sampler(ideal, torch.zeros(1, dtype=torch.float64), times, lambda: 0, ignore)
    assert nothing.item() == pytest.approx(MEAN, abs=0.02)
    return (shares - nothing)[:steps].norm().item()


def test_stochastic_samplers_draw_the_datas_deviation():
    first, second = (deviation(sampler, 100) for sampler in (sample_ddpm, sample_dpmpp_2m_sde))
    assert first == pytest.approx(SPREAD, rel=0.04) and second == pytest.approx(SPREAD, rel=0.01)
    first, second = (abs(deviation(sampler, 12) - SPREAD) for sampler in (sample_ddpm, sample_dpmpp_2m_sde))
    assert second < first / 4 and second < 0.02 * SPREAD


@pytest.mark.parametrize(
    "second, first, steps",
    [
        (sample_dpmpp_2m, sample_ddim, 157),
        (sample_dpmpp_2m, sample_ddim, MAX_STEPS),
        (sample_dpmpp_2m_sde, sample_ddpm, 157),
        (sample_dpmpp_2m_sde, sample_ddpm, 1_000),
    ],
)
def test_steps_without_length_are_none(second, first, steps):
    """Where alpha_bar is clamped, at either end, noise levels are equal while the network is told another time."""

    def network(x, t):
        return ideal(x, t) + 0.01 * math.sin(300 * t)

    def drawn(sampler, steps):
        return sampler(network, torch.tensor([0.3, -1.0]), sampling_times(steps), lambda: torch.zeros(2), ignore)

    torch.testing.assert_close(drawn(second, steps), drawn(first, min(steps, 500)), rtol=0, atol=3 / min(steps, 500))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("steps, denoise", [(1, 1.0), (2, 1.0), (5, 0.003), (5, 0.997), (400, 0.01)])
def test_runs_at_the_ends_of_the_schedule(sampler, steps, denoise):
    clean, noise = torch.tensor([MEAN, 0.2]), torch.tensor([0.5, -0.5])
    times = sampling_times(steps, denoise=denoise)
    draws = iter(noises(clean, steps))
    drawn = sampler(ideal, add_noise(clean, noise, times[0]), times, lambda: next(draws), ignore)
    assert drawn.isfinite().all() and (drawn - MEAN).abs().max() < 3 * SPREAD
    if denoise < 0.02 and sampler is not SAMPLERS["lcm"]:  # which draws all noise anew at every step
        torch.testing.assert_close(drawn, clean, rtol=0, atol=0.1)
