"""The losses that the networks are trained with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...diffusion.schedule import add_noise, alpha_bar
from ...util.errors import WuerstchenError

HIGH_NOISE = 0.35  # the noisiest part of the training times, where the condition decides what is drawn


def training_times(count: int, high_noise: float = 0.0) -> Tensor:
    """(count,) times: uniform on (0, 1], a little more often exactly 1; a share `high_noise` from HIGH_NOISE alone."""
    return times_of(torch.rand(count), high_noise)


def times_of(uniform: Tensor, high_noise: float = 0.0) -> Tensor:
    """Uniform numbers in [0, 1) -> training times; a share `high_noise` of them comes from HIGH_NOISE alone."""
    if high_noise:
        noisiest = high_noise + (1 - high_noise) * HIGH_NOISE
        uniform = torch.where(
            uniform < noisiest,
            uniform / noisiest * HIGH_NOISE,
            1 - (1 - uniform) / (1 - high_noise),
        )
    return ((1 - uniform) * 1.08 + 0.001).clamp(0.001, 1.0)


WEIGHTS = ("p2", "min-snr", "v")  # the first is the paper's


def check_weight(kind: str) -> None:
    """Raises WuerstchenError unless this is one of WEIGHTS."""
    if kind not in WEIGHTS:
        raise WuerstchenError(f"loss_weight is {kind!r}: choose one of {', '.join(WEIGHTS)}")


def loss_weight(kind: str, snr: Tensor, k: float, gamma: float) -> Tensor:
    """The weight of the noise's squared error at signal-to-noise ratios `snr`; one of WEIGHTS.

    p2: 1 / (k + snr) (arXiv 2204.00227). min-snr: min(snr, gamma) / snr (arXiv 2303.09556). v: 1 + 1 / snr, with which
    it is the squared error of v = sqrt(a) noise - sqrt(1 - a) clean (v-prediction, arXiv 2202.00512), computed from the
    predicted noise: the network gives noise as ever, and all samplers take it.
    """
    if kind == "p2":
        return 1 / (k + snr)
    if kind == "min-snr":
        return snr.clamp(max=gamma) / snr
    return 1 + 1 / snr


def diffusion_loss(
    model,
    clean: Tensor,
    k: float,
    t: Tensor,
    noise: Tensor | None = None,
    largest_error: float = math.inf,
    weight: str = "p2",
    gamma: float = 5.0,
) -> Tensor:
    """Mean squared error of the predicted noise, weighted by the signal-to-noise ratio (`loss_weight`).

    Args:
        model: `model(x, t)` predicts the noise in x (B, ...) at times t (B,).
        clean: (B, ...), the latents to which noise is added.
        k: the smaller it is, the more weight the noisiest times get, at which the condition decides what is drawn.
        noise: of the shape of `clean`; drawn if it is not given.
        largest_error: a sample whose mean squared error exceeds it counts as this much and gives no gradient. Stage C
            divides by |1 - b|, so that close to b = 1 a single sample can undo what many have taught.
    """
    noise = torch.randn_like(clean) if noise is None else noise
    signal = alpha_bar(t)
    weights = loss_weight(weight, signal / (1 - signal), k, gamma)
    error = (model(add_noise(clean, noise, t), t).float() - noise).square().flatten(1).mean(dim=1)
    return (error.clamp(max=largest_error) * weights).mean()


def contrastive_loss(texts: Tensor, pictures: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss (arXiv 2103.00020) between embeddings (B, C), where a text may match several pictures.

    `same` (B, B) says which text describes which picture; `scale` multiplies the cosine similarities.
    """
    logits = scale * F.normalize(texts, dim=1) @ F.normalize(pictures, dim=1).T
    target = same.float() / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def quantization_loss(latent: Tensor, quantized: Tensor, commitment: float = 0.25) -> Tensor:
    """VQ-VAE's codebook and commitment losses (arXiv 1711.00937)."""
    return F.mse_loss(quantized, latent.detach()) + commitment * F.mse_loss(latent, quantized.detach())
