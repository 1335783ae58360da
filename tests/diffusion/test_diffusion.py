"""Schedule and guidance against formulas in float64."""

import math
from itertools import pairwise

import pytest
import torch

from tests.reference import signal
from wuerstchen_core.diffusion.guidance import guide, keep_outside, prepare, rescale, within
from wuerstchen_core.diffusion.schedule import add_noise, alpha_bar, sampling_times
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.util.errors import WuerstchenError


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


def test_guidance_goes_from_the_second_half_to_the_first():
    def halves(x, t):
        assert x.shape[0] == 4
        return torch.cat([torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)])

    assert guide(halves, 4.0)(torch.zeros(2, 1), 0.5).tolist() == [[9.0], [9.0]]


def test_guidance_in_an_interval_of_times_runs_the_conditional_half_alone_outside_of_it():
    seen = []

    def both(x, t):
        seen.append((t, len(x)))
        return torch.cat([torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)])

    def alone(x, t):
        seen.append((t, len(x)))
        return torch.full((2, 1), 3.0)

    model = within((0.25, 0.5), guide(both, 4.0), alone)
    given = {t: model(torch.zeros(2, 1), t)[0].item() for t in (0.75, 0.5, 0.3, 0.25, 0.2)}
    assert given == {0.75: 3.0, 0.5: 9.0, 0.3: 9.0, 0.25: 9.0, 0.2: 3.0}
    assert seen == [(0.75, 2), (0.5, 4), (0.3, 4), (0.25, 4), (0.2, 2)]


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaled_guidance_has_the_conditional_deviation(share):
    """By the formulas, for each picture of the batch on its own."""
    torch.manual_seed(2)
    x, t = torch.randn(2, 3, 4, 4, dtype=torch.float64), 0.8
    conditional, unconditional = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 3.0]).view(
        -1, 1, 1, 1
    )
    noise = guide(lambda x, t: torch.cat([conditional, unconditional]), 4.0, share)(x, t)

    def clean(noise):
        return (x - math.sqrt(1 - signal(t)) * noise) / math.sqrt(signal(t))

    guided = clean(unconditional + 4.0 * (conditional - unconditional))
    for ours, plain, wanted in zip(clean(noise), guided, clean(conditional), strict=True):
        factor = share * (wanted.var() / plain.var()).sqrt() + 1 - share
        torch.testing.assert_close(ours, plain * factor, rtol=1e-9, atol=1e-9)
        if share == 1:
            assert ours.std().item() == pytest.approx(wanted.std().item())


def test_nothing_can_be_rescaled_to_nothing():
    """A latent of one value has no deviation: it stays."""
    flat = torch.full((1, 2, 3, 3), 0.5)
    assert torch.equal(rescale(flat, torch.randn(1, 2, 3, 3), 1.0), flat)


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
