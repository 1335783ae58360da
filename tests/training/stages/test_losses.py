"""Losses against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from wuerstchen_core.diffusion.schedule import alpha_bar
from wuerstchen_core.training.stages.losses import (
    contrastive_loss,
    diffusion_loss,
    quantization_loss,
    times_of,
    training_times,
)


def test_contrastive_loss_is_cross_entropy_both_ways():
    torch.manual_seed(1)
    texts, pictures, scale = torch.randn(5, 8), torch.randn(5, 8), torch.tensor(3.0)
    logits = 3 * F.normalize(texts) @ F.normalize(pictures).T
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(contrastive_loss(texts, pictures, scale, torch.eye(5).bool()), expected)


def test_quantization_moves_codebook_and_latent():
    latent = torch.tensor([1.0], requires_grad=True)
    quantized = torch.tensor([3.0], requires_grad=True)
    loss = quantization_loss(latent, quantized, commitment=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(5.0)
    assert (quantized.grad.item(), latent.grad.item()) == pytest.approx((4.0, -1.0))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_a_share_of_the_times_is_of_high_noise_alone(share):
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    t = times_of(uniform, share)
    assert (t.diff() <= 0).all()
    noisiest = share + (1 - share) * 0.35
    assert (t > 0.65 * 1.08 + 0.001).double().mean().item() == pytest.approx(noisiest, abs=1e-3)
    assert (t > 0.325 * 1.08 + 0.001).double().mean().item() == pytest.approx((noisiest + 1) / 2, abs=1e-3)
    assert (t == 1).double().mean().item() == pytest.approx(noisiest * 0.081 / 1.08 / 0.35, abs=1e-3)


@pytest.mark.parametrize("k", [1.0, 0.1])
def test_loss_is_weighted_by_the_share_of_noise(k):
    """A prediction of zero costs the mean of noise² / (k + SNR), where SNR = alpha_bar / (1 - alpha_bar)."""
    torch.manual_seed(5)
    loss = diffusion_loss(
        lambda x, t: torch.zeros_like(x), torch.zeros(100_000, 1, 2, 2), k, training_times(100_000)
    ).item()
    torch.manual_seed(6)
    t = training_times(200_000)
    assert t.min() >= 0.001 and t.max() == 1
    assert (t == 1).float().mean().item() == pytest.approx(0.081 / 1.08, abs=0.003)
    signal = alpha_bar(t).double()
    assert loss == pytest.approx(((1 - signal) / (k * (1 - signal) + signal)).mean().item(), rel=0.02)


def test_no_error_is_limited_unless_a_limit_is_given():
    """Predictions that are 1, 2 and 30 away from the noise; the third exceeds the limit, and has no gradient then."""
    off = torch.tensor([1.0, 2.0, 30.0], requires_grad=True)
    t, clean, noise = torch.full((3,), 0.5), torch.zeros(3, 2, 2), torch.randn(3, 2, 2)
    weight = 1 / (1 + (alpha_bar(t) / (1 - alpha_bar(t))))[0].item()

    def loss(**limit):
        return diffusion_loss(lambda x, t: noise + off[:, None, None], clean, 1.0, t, noise, **limit)

    assert loss().item() == pytest.approx((1 + 4 + 900) / 3 * weight, rel=1e-5)
    limited = loss(largest_error=20.0)
    assert limited.item() == pytest.approx((1 + 4 + 20) / 3 * weight, rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(limited, off)[0], torch.tensor([2.0, 4.0, 0.0]) / 3 * weight)


@pytest.mark.parametrize("weight", ["p2", "min-snr", "v"])
def test_the_losses_weights_are_those_of_their_papers(weight):
    """In float64; the error of v is that of v itself."""
    torch.manual_seed(0)
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    clean, noise, off = (torch.randn(6, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    a = alpha_bar(t)[:, None, None, None]
    snr = (a / (1 - a)).flatten()
    assert (snr > 5).any() and (snr < 5).any()
    x = a.sqrt() * clean + (1 - a).sqrt() * noise
    error = off.square().flatten(1).mean(dim=1)
    if weight == "v":
        found = (x - (1 - a).sqrt() * (noise + off)) / a.sqrt()  # the clean latent, by the predicted noise
        v = a.sqrt() * noise - (1 - a).sqrt() * clean
        expected = (a.sqrt() * (noise + off) - (1 - a).sqrt() * found - v).square().mean()
    else:
        weights = 1 / (0.3 + snr) if weight == "p2" else torch.minimum(snr, torch.tensor(5.0)) / snr
        expected = (error * weights).mean()
    loss = diffusion_loss(lambda x, t: (noise + off).double(), clean, 0.3, t, noise, weight=weight, gamma=5.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # the error is taken in float32
