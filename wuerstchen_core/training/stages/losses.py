"""What the networks are trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...diffusion.schedule import add_noise, alpha_bar

# Stage C's division by |1 - b| can blow up near b = 1, where one sample would undo what many have taught.
LARGEST_ERROR = 20.0

HIGH_NOISE = 0.35  # the share of the times, those nearest to 1, at which a picture is decided by its condition


def training_times(count: int, high_noise: float = 0.0) -> Tensor:
    """(count,) times: uniform on (0, 1], a little more often exactly 1; a share `high_noise` from HIGH_NOISE alone."""
    return times_of(torch.rand(count), high_noise)


def times_of(uniform: Tensor, high_noise: float = 0.0) -> Tensor:
    """Numbers that are uniform in [0, 1) -> training times, the share `high_noise` of them from HIGH_NOISE alone."""
    if high_noise:
        noisiest = high_noise + (1 - high_noise) * HIGH_NOISE
        uniform = torch.where(
            uniform < noisiest,
            uniform / noisiest * HIGH_NOISE,
            1 - (1 - uniform) / (1 - high_noise),
        )
    return ((1 - uniform) * 1.08 + 0.001).clamp(0.001, 1.0)


def diffusion_loss(model, clean: Tensor, k: float, t: Tensor, noise: Tensor | None = None) -> Tensor:
    """Squared error of the predicted noise, weighted by 1 / (k + signal-to-noise ratio) (P2, arXiv 2204.00227).

    The smaller `k`, the more the times count at which there is little but noise, and the text must tell what to draw.

    `model(x, t)` predicts the noise in x (B, ...) at times t (B,); `clean` (B, ...) is what it should find. Noise is
    drawn where it is not given. A sample whose mean squared error is above LARGEST_ERROR teaches nothing.
    """
    noise = torch.randn_like(clean) if noise is None else noise
    signal = alpha_bar(t)
    error = (model(add_noise(clean, noise, t), t).float() - noise).square().flatten(1).mean(dim=1)
    return (error.clamp(max=LARGEST_ERROR) / (k + signal / (1 - signal))).mean()


def contrastive_loss(texts: Tensor, pictures: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss (arXiv 2103.00020) between (B, C) embeddings; pairs of the same emoji, `same` (B, B), all count."""
    logits = scale * F.normalize(texts, dim=1) @ F.normalize(pictures, dim=1).T
    target = same.float() / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def quantization_loss(latent: Tensor, quantized: Tensor, commitment: float = 0.25) -> Tensor:
    """VQ-VAE's codebook and commitment losses (arXiv 1711.00937)."""
    return F.mse_loss(quantized, latent.detach()) + commitment * F.mse_loss(latent, quantized.detach())
