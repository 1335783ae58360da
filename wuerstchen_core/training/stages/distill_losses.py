"""Latent consistency distillation (LCM, arXiv 2310.04378): from a teacher's trajectories to a student's jumps.

A consistency function maps a noisy latent x at any time t to the clean latent at the end of the teacher's trajectory
through it. It is the identity at t = 0, its boundary condition, and the same all along a trajectory: so it is learned
from its own values one step of the teacher further.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ...diffusion.schedule import alpha_bar

SIGMA_DATA = 0.5
TIME_SCALE = 10_000.0  # LCM's: 1000 discrete times, ten times over

Predict = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> the noise in x


def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """t (N,) in [0, 1] -> c_skip, c_out (N,): 1 and 0 at t = 0, and nearly 0 and 1 from t = 0.01 on."""
    scaled = t.double() * TIME_SCALE
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def consistency(predict: Predict, x: Tensor, t: Tensor) -> Tensor:
    """c_skip * x + c_out * (the clean latent that `predict` sees in x): x (N, ...), t (N,) -> (N, ...)."""
    c_skip, c_out = boundary(t)
    return _rows(c_skip, x) * x + _rows(c_out, x) * clean_of(x, predict(x, t), t)


def clean_of(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The clean latent in x (N, ...) at times t (N,), given its noise."""
    signal = alpha_bar(t.double())
    return (x - _rows((1 - signal).sqrt(), x) * noise) / _rows(signal.sqrt(), x)


def teacher_step(predict: Predict, x: Tensor, t: Tensor, s: Tensor, steps: int = 1) -> Tensor:
    """x (N, ...) at times t (N,) -> where the teacher's trajectory through it is at s (N,), by `steps` of DDIM."""
    for start, end in pairwise(torch.lerp(t, s, i / steps) for i in range(steps + 1)):
        noise = predict(x, start)
        signal = alpha_bar(end.double())
        clean = clean_of(x, noise, start)
        x = _rows(signal.sqrt(), x) * clean + _rows((1 - signal).sqrt(), x) * noise
    return x


def pseudo_huber(found: Tensor, goal: Tensor, t: Tensor, k: float) -> Tensor:
    """Mean of sqrt(|found - goal|^2 + c^2) - c over the samples (N, ...), c = 0.00054 * sqrt(d) (arXiv 2310.14189).

    A sample's difference is weighted by sqrt(snr / (k + snr)). A clean latent's error is that of the predicted noise
    times 1 / sqrt(snr), which is 100 at t = 1: with k = 0 these times would drown all others.
    """
    signal = alpha_bar(t.double())
    ratio = signal / (1 - signal)
    difference = ((found.float() - goal.float()) * _rows((ratio / (k + ratio)).sqrt(), found).float()).flatten(1)
    c = 0.00054 * math.sqrt(difference.shape[1])
    return ((difference.square().sum(dim=1) + c * c).sqrt() - c).mean()


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, …) with as many axes as `like`, and in its precision."""
    return values.to(like).view(-1, *[1] * (like.dim() - 1))
