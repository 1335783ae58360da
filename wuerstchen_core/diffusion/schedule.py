"""The cosine noise schedule in continuous time, 0 (picture) to 1 (noise), and the times that a sampler visits."""

import math

import numpy as np
import torch
from torch import Tensor

from ..util.checks import one_of, real_number, whole_number

OFFSET = 0.008
SCHEDULES = ("even", "uneven")
MAX_STEPS = 10_000

# The released uneven times: 19 steps from 1 to 2/3, then 10 from 2/3 to 0.
_UNEVEN_PROGRESS, _UNEVEN_TIMES = (0.0, 19 / 29, 1.0), (1.0, 2 / 3, 0.0)


def alpha_bar(t: Tensor) -> Tensor:
    """Share of the signal's variance at times t in [0, 1], in t's precision, within [1e-4, 0.9999].

    Source: Nichol & Dhariwal's cosine schedule (arXiv 2102.09672), clamped as the released models were trained.
    """
    start = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2
    return (torch.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2 / start).clamp(1e-4, 0.9999)


def add_noise(clean: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise; t (B,) or one time for all."""
    signal = alpha_bar(torch.as_tensor(t, dtype=torch.float64)).to(clean)
    signal = signal.view(-1, *[1] * (clean.dim() - 1))
    return signal.sqrt() * clean + (1 - signal).sqrt() * noise


def sampling_times(steps: int, schedule: str = "even", denoise: float = 1.0) -> list[float]:
    """steps + 1 falling times, from `denoise` (1: pure noise) to 0.

    "uneven" spends two thirds of a full run's steps above t = 2/3; 29 steps are the released list.

    Raises:
        WuerstchenError: steps outside 1 to 10,000, denoise outside [0, 1], or an unknown schedule.
    """
    steps = whole_number("steps", steps, 1, MAX_STEPS)
    denoise = real_number("denoise", denoise, 0.0, 1.0)
    if one_of("schedule", schedule, SCHEDULES) == "even":
        return np.linspace(denoise, 0.0, steps + 1).tolist()
    start = np.interp(1 - denoise, [1 - t for t in _UNEVEN_TIMES], _UNEVEN_PROGRESS)
    return np.interp(np.linspace(start, 1.0, steps + 1), _UNEVEN_PROGRESS, _UNEVEN_TIMES).tolist()
