"""Samplers: plain functions over a noise predictor, in the manner of k-diffusion's `sampling.py`.

`model(x, t)` gives the noise in x at time t. `times` fall from the start to 0. `draw()` gives fresh standard normal
noise in x's shape. `callback(step, clean)` is called after every step, 1 to len(times) - 1, with the clean latent
predicted at that step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..util.errors import WuerstchenError
from .schedule import alpha_bar

Model = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor], None]


def sample_ddpm(model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback) -> Tensor:
    """Ancestral sampling (DDPM, arXiv 2006.11239): every step but the last adds fresh noise."""
    for step, (t, u) in enumerate(zip(times, times[1:]), start=1):
        noise = model(x, t)
        at_t, at_u = _alpha_bar(t), _alpha_bar(u)
        alpha = at_t / at_u
        clean = _predict_clean(x, noise, at_t)
        x = (x - (1 - alpha) / math.sqrt(1 - at_t) * noise) / math.sqrt(alpha)
        if u > 0:
            x = x + math.sqrt((1 - alpha) * (1 - at_u) / (1 - at_t)) * draw()
        callback(step, clean)
    return x


def sample_ddim(model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback) -> Tensor:
    """Deterministic sampling (DDIM with eta 0, arXiv 2010.02502); `draw` is not called."""
    for step, (t, u) in enumerate(zip(times, times[1:]), start=1):
        noise = model(x, t)
        at_u = _alpha_bar(u)
        clean = _predict_clean(x, noise, _alpha_bar(t))
        x = math.sqrt(at_u) * clean + math.sqrt(1 - at_u) * noise
        callback(step, clean)
    return x


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim}


def sampler_named(name: str):
    """Raises WuerstchenError for a name that is not in SAMPLERS."""
    if name not in SAMPLERS:
        raise WuerstchenError(f"unknown sampler {name!r}: take one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _alpha_bar(t: float) -> float:
    return alpha_bar(torch.tensor(t, dtype=torch.float64)).item()


def _predict_clean(x: Tensor, noise: Tensor, signal: float) -> Tensor:
    return (x - math.sqrt(1 - signal) * noise) / math.sqrt(signal)
