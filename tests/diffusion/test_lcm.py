"""Multistep consistency sampling against its formula in float64."""

import math

import pytest
import torch

from tests.reference import predictor, signal
from wuerstchen_core.diffusion.samplers import SAMPLERS, sample_lcm
from wuerstchen_core.diffusion.schedule import sampling_times


@pytest.mark.parametrize("steps, denoise", [(1, 1.0), (4, 1.0), (3, 0.6)])
def test_lcm_is_its_formula_in_float64(steps, denoise):
    times = sampling_times(steps, denoise=denoise)
    torch.manual_seed(3)
    start = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    noises = [torch.randn_like(start) for _ in range(steps - 1)]  # none behind the last step
    x = start
    for t, z in zip(times, [*noises, None], strict=False):
        clean = (x - math.sqrt(1 - signal(t)) * predictor(x, t)) / math.sqrt(signal(t))
        if z is not None:
            following = times[times.index(t) + 1]
            x = math.sqrt(signal(following)) * clean + math.sqrt(1 - signal(following)) * z
    draws, seen = iter(noises), []
    drawn = sample_lcm(predictor, start, times, lambda: next(draws), seen.append)
    torch.testing.assert_close(drawn, clean, rtol=1e-12, atol=1e-12)
    assert next(draws, None) is None
    assert [state["step"] for state in seen] == list(range(1, steps + 1))
    assert [state["t"] for state in seen] == times[:-1] and seen[0]["x"] is start
    torch.testing.assert_close(seen[-1]["clean"], drawn, rtol=0, atol=0)


def test_lcm_ends_on_the_clean_latent_itself():
    clean, start = torch.full((1, 1, 2, 2), 0.7, dtype=torch.float64), torch.randn(1, 1, 2, 2, dtype=torch.float64)

    def oracle(x, t):
        return (x - math.sqrt(signal(t)) * clean) / math.sqrt(1 - signal(t))

    drawn = SAMPLERS["lcm"](oracle, start, sampling_times(4), lambda: torch.randn_like(start), lambda state: None)
    torch.testing.assert_close(drawn, clean, rtol=1e-12, atol=1e-12)
