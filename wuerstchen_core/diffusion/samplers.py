"""Samplers: plain functions over a noise predictor, in the manner of k-diffusion's `sampling.py`.

`model(x, t)` gives the noise in x at time t. `times` fall from the start to 0. `draw()` gives fresh standard normal
noise in x's shape. `callback` is called after every step with a dict: `step` (1 to len(times) - 1), `t` and `sigma`
(the time that the step started from, and its ratio of noise to signal), `x` (the noisy latent there) and `clean` (the
clean latent predicted from it).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .schedule import alpha_bar

Model = Callable[[Tensor, float], Tensor]
Callback = Callable[[dict], None]


def sample_ddpm(model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback) -> Tensor:
    """Ancestral sampling (DDPM, arXiv 2006.11239): every step but the last adds fresh noise."""
    for step, (t, u) in enumerate(pairwise(times), start=1):
        start, noise = x, model(x, t)
        at_t, at_u = signal_at(t), signal_at(u)
        alpha = at_t / at_u
        clean = predict_clean(x, noise, at_t)
        x = (x - (1 - alpha) / math.sqrt(1 - at_t) * noise) / math.sqrt(alpha)
        if u > 0:
            x = x + math.sqrt((1 - alpha) * (1 - at_u) / (1 - at_t)) * draw()
        callback(_told(step, t, start, clean))
    return x


def sample_ddim(model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback) -> Tensor:
    """Deterministic sampling (DDIM with eta 0, arXiv 2010.02502); `draw` is not called."""
    for step, (t, u) in enumerate(pairwise(times), start=1):
        start, noise = x, model(x, t)
        at_u = signal_at(u)
        clean = predict_clean(x, noise, signal_at(t))
        x = math.sqrt(at_u) * clean + math.sqrt(1 - at_u) * noise
        callback(_told(step, t, start, clean))
    return x


def sample_lcm(model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback) -> Tensor:
    """Multistep consistency sampling (LCM, arXiv 2310.04378, algorithm 3), for networks distilled for it.

    Every step jumps to the clean latent and, but for the last, adds fresh noise up to the next time.
    """
    for step, (t, u) in enumerate(pairwise(times), start=1):
        start, at_u = x, signal_at(u)
        clean = predict_clean(x, model(x, t), signal_at(t))
        x = math.sqrt(at_u) * clean + math.sqrt(1 - at_u) * draw() if u > 0 else clean
        callback(_told(step, t, start, clean))
    return x


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "lcm": sample_lcm}


def signal_at(t: float) -> float:
    """`alpha_bar` of one time, in float64."""
    return alpha_bar(torch.tensor(t, dtype=torch.float64)).item()


def predict_clean(x: Tensor, noise: Tensor, signal: float) -> Tensor:
    """The clean latent, given the noise in x and the signal's share of x's variance."""
    return (x - math.sqrt(1 - signal) * noise) / math.sqrt(signal)


def predict_noise(x: Tensor, clean: Tensor, signal: float) -> Tensor:
    """The inverse of `predict_clean`: the noise in x, given the clean latent."""
    return (x - math.sqrt(signal) * clean) / math.sqrt(1 - signal)


def _told(step: int, t: float, x: Tensor, clean: Tensor) -> dict:
    signal = signal_at(t)
    return {"step": step, "t": t, "sigma": math.sqrt((1 - signal) / signal), "x": x, "clean": clean}
