"""The parts of consistency distillation, against formulas in float64 and trajectories that are known."""

import math

import pytest
import torch

from tests.reference import predictor, signal
from wuerstchen_core.training.stages.distill_losses import boundary, consistency, pseudo_huber, teacher_step

SPREAD = 0.6  # of Gaussian latents, whose noise and whose trajectories are known


def gaussian(x, t):
    """The noise expected in x where the clean latents are normal with standard deviation SPREAD."""
    at = torch.tensor([signal(one) for one in t.tolist()], dtype=x.dtype)[:, None]
    return (1 - at).sqrt() * x / (at * SPREAD**2 + 1 - at)


def trajectory(x, t, s):
    """The probability flow of those latents: a share of the deviation at each time stays the same."""

    def deviation(time):
        return torch.tensor([math.sqrt(signal(one) * SPREAD**2 + 1 - signal(one)) for one in time.tolist()])[:, None]

    return x * deviation(s) / deviation(t)


def test_the_teacher_follows_its_trajectory():
    times = torch.tensor([0.95, 0.7, 0.4, 0.1], dtype=torch.float64)
    ends = torch.tensor([0.3, 0.2, 0.35, 0.0], dtype=torch.float64)
    x = torch.tensor([[-1.2, 0.4, 2.0]], dtype=torch.float64).repeat(4, 1)
    exact = trajectory(x, times, ends)
    errors = [
        (teacher_step(gaussian, x, times, ends, steps) - exact).abs().max().item() for steps in (1, 10, 100, 1000)
    ]
    assert errors[-1] < 1e-3 and errors[0] > 20 * errors[-1]
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.3)  # DDIM is of first order


def test_a_step_of_the_teacher_is_one_of_ddim():
    times, ends = torch.tensor([0.9, 0.33], dtype=torch.float64), torch.tensor([0.8, 0.0], dtype=torch.float64)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for row, t, s in zip(range(2), times.tolist(), ends.tolist(), strict=True):
        noise = predictor(x[row], t)
        clean = (x[row] - math.sqrt(1 - signal(t)) * noise) / math.sqrt(signal(t))
        expected = math.sqrt(signal(s)) * clean + math.sqrt(1 - signal(s)) * noise
        found = teacher_step(lambda x, t: predictor(x, t[:, None, None, None]), x, times, ends)[row]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_consistency_function_is_the_identity_at_0_and_the_clean_latent_at_the_times_of_sampling():
    x = torch.randn(3, 5, dtype=torch.float64)
    t = torch.tensor([0.0, 1e-4, 0.25], dtype=torch.float64)
    found = consistency(gaussian, x, t)
    assert torch.equal(found[0], x[0])
    assert [part[1].item() for part in boundary(t)] == pytest.approx([0.25 / 1.25, 1 / math.sqrt(1.25)])
    clean = (x[2] - math.sqrt(1 - signal(0.25)) * gaussian(x, t)[2]) / math.sqrt(signal(0.25))
    torch.testing.assert_close(found[2], clean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [0.0, 0.03])
def test_the_loss_is_pseudo_huber_of_the_weighted_difference(k):
    torch.manual_seed(1)
    found, goal = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    found[1] = goal[1]
    t = torch.tensor([1.0, 0.5])
    ratio = signal(1.0) / (1 - signal(1.0))
    weight = math.sqrt(ratio / (k + ratio))
    c = 0.00054 * math.sqrt(36)
    length = weight * (found[0] - goal[0]).double().norm().item()
    expected = (math.sqrt(length**2 + c**2) - c) / 2
    assert pseudo_huber(found, goal, t, k).item() == pytest.approx(expected, rel=1e-5)
