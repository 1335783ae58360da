"""Samplers: plain functions over a noise predictor, in the manner of k-diffusion's `sampling.py`.

`model(x, t)` gives the noise in x at time t. `times` fall from the start to 0. `draw()` gives fresh standard normal
noise in x's shape. `callback` is called after every step with a dict: `step` (1 to len(times) - 1), `t` and `sigma`
(the time that the step started from, and its ratio of noise to signal), `x` (the noisy latent there) and `clean` (the
clean latent predicted from it).
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .schedule import alpha_bar

Model = Callable[[Tensor, float], Tensor]
Callback = Callable[[dict], None]

LONGEST_EXTRAPOLATION = 10.0  # lengths of the step before


def sample_ddpm(model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback) -> Tensor:
    """Ancestral sampling (DDPM, arXiv 2006.11239): every step but the last adds fresh noise."""
    for step, (t, u, at_t, at_u) in enumerate(_steps(times), start=1):
        start, noise = x, model(x, t)
        alpha = at_t / at_u
        clean = predict_clean(x, noise, at_t)
        x = (x - (1 - alpha) / math.sqrt(1 - at_t) * noise) / math.sqrt(alpha)
        if u > 0:
            x = x + math.sqrt((1 - alpha) * (1 - at_u) / (1 - at_t)) * draw()
        callback(_told(step, t, at_t, start, clean))
    return x


def sample_ddim(model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback) -> Tensor:
    """Deterministic sampling (DDIM with eta 0, arXiv 2010.02502); `draw` is not called."""
    for step, (t, _, at_t, at_u) in enumerate(_steps(times), start=1):
        start, noise = x, model(x, t)
        clean = predict_clean(x, noise, at_t)
        x = math.sqrt(at_u) * clean + math.sqrt(1 - at_u) * noise
        callback(_told(step, t, at_t, start, clean))
    return x


def sample_lcm(model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback) -> Tensor:
    """Multistep consistency sampling (LCM, arXiv 2310.04378, algorithm 3), for networks distilled for it.

    Every step jumps to the clean latent and, but for the last, adds fresh noise up to the next time.
    """
    for step, (t, u, at_t, at_u) in enumerate(_steps(times), start=1):
        start, clean = x, predict_clean(x, model(x, t), at_t)
        x = math.sqrt(at_u) * clean + math.sqrt(1 - at_u) * draw() if u > 0 else clean
        callback(_told(step, t, at_t, start, clean))
    return x


def sample_dpmpp_2m(
    model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095): DDIM of second order; `draw` is not called."""
    return _multistep(model, x, times, None, callback)


def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor], callback: Callback
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095): DDPM of second order, with fresh noise at every step but the last."""
    return _multistep(model, x, times, draw, callback)


SAMPLERS = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "lcm": sample_lcm,
}
STOCHASTIC = ("ddpm", "dpmpp_2m_sde", "lcm")  # fresh noise at every step


def _multistep(
    model: Model, x: Tensor, times: list[float], draw: Callable[[], Tensor] | None, callback: Callback
) -> Tensor:
    """Exponential integrators in the half-log-SNR, along which the clean latent is extrapolated from two predictions.

    `draw` is None for the ODE. Above t = 0.9936 all times have one noise level: steps there have no length, and what a
    step much shorter than the next one predicts says nothing about the slope.
    """
    before, length_before = x, 0.0
    for step, (t, u, at_t, at_u) in enumerate(_steps(times), start=1):
        start, clean = x, predict_clean(x, model(x, t), at_t)
        if u > 0:
            length = half_log_snr(at_u) - half_log_snr(at_t)
            aim = clean
            if length < LONGEST_EXTRAPOLATION * length_before:
                aim = clean + length / (2 * length_before) * (clean - before)
            decay = 1 if draw is None else 2  # the SDE forgets twice as fast
            x = math.sqrt((1 - at_u) / (1 - at_t)) * math.exp((1 - decay) * length) * x
            x = x - math.sqrt(at_u) * math.expm1(-decay * length) * aim
            if draw is not None:
                x = x + math.sqrt(-(1 - at_u) * math.expm1(-2 * length)) * draw()
            before, length_before = clean, length
        else:
            x = clean
        callback(_told(step, t, at_t, start, clean))
    return x


def _steps(times: list[float]) -> Iterator[tuple[float, float, float, float]]:
    """(t, u, signal at t, signal at u) of every step from t to u.

    The last one ends with the predicted clean latent, without the 1 % of noise that `alpha_bar` leaves at time 0.
    """
    signals = alpha_bar(torch.tensor(times[:-1], dtype=torch.float64)).tolist()
    for (t, u), (at_t, at_u) in zip(pairwise(times), pairwise([*signals, 1.0]), strict=True):
        yield t, u, at_t, at_u


def signal_at(t: float) -> float:
    """`alpha_bar` of one time, in float64."""
    return alpha_bar(torch.tensor(t, dtype=torch.float64)).item()


def half_log_snr(signal: float) -> float:
    """log(sqrt(signal / (1 - signal))), the lambda of DPM-Solver."""
    return 0.5 * math.log(signal / (1 - signal))


def predict_clean(x: Tensor, noise: Tensor, signal: float) -> Tensor:
    """The clean latent, given the noise in x and the signal's share of x's variance."""
    return (x - math.sqrt(1 - signal) * noise) / math.sqrt(signal)


def predict_noise(x: Tensor, clean: Tensor, signal: float) -> Tensor:
    """The inverse of `predict_clean`: the noise in x, given the clean latent."""
    return (x - math.sqrt(signal) * clean) / math.sqrt(1 - signal)


def _told(step: int, t: float, signal: float, x: Tensor, clean: Tensor) -> dict:
    return {"step": step, "t": t, "sigma": math.sqrt((1 - signal) / signal), "x": x, "clean": clean}
