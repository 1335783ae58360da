"""The cosine noise schedule as ComfyUI's samplers and schedulers read it."""

import math

import comfy.model_sampling
import torch
from torch import Tensor

from ...wuerstchen_core.diffusion.schedule import OFFSET, alpha_bar

STEPS = 10_000  # of the table that some of ComfyUI's schedulers read
BEND = 0.02
LEAST, MOST = 1e-4, 0.9999  # what alpha_bar is clamped to


class CosineSampling(comfy.model_sampling.StableCascadeSampling, comfy.model_sampling.EPS):
    """The core's schedule, strictly rising: ComfyUI's own version of it is flat where alpha_bar is clamped.

    A multistep sampler divides by the length of a step, which is none at all on the flat ends (t above 0.9936 or below
    0.0040). Here the last 2 % of the times on either side are bent to end where the clamp begins. The times of up to 50
    even steps are the core's.
    """

    def set_parameters(self, shift: float = 1.0, cosine_s: float = OFFSET) -> None:
        if (shift, cosine_s) != (1.0, OFFSET):
            raise ValueError("another shift is ModelSamplingStableCascade's to set")
        self.shift = shift
        self.low, self.high = (_time(torch.tensor(share, dtype=torch.float64)).item() for share in (MOST, LEAST))
        self.num_timesteps = STEPS
        self.set_sigmas(self.sigma(torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS).float())

    def sigma(self, timestep: Tensor) -> Tensor:
        signal = alpha_bar(self._bent(timestep))
        return ((1 - signal) / signal).sqrt()

    def timestep(self, sigma: Tensor) -> Tensor:
        exact = sigma.float() if sigma.device.type == "mps" else sigma.double()  # mps has no float64
        return self._straight(_time(1 / (exact * exact + 1))).to(sigma)

    def percent_to_sigma(self, percent: float) -> float:
        return float(super().percent_to_sigma(percent))

    def network_time(self, t: Tensor) -> Tensor:
        """The time that the network is told: 1 at the start, 0 at the end, between them the noise's own."""
        bent = torch.where(t >= 1 - 1e-4, torch.ones_like(t), self._bent(t))
        return torch.where(t <= 1e-4, torch.zeros_like(t), bent)

    def _bent(self, t: Tensor) -> Tensor:
        upper = 1 - BEND + (t - 1 + BEND) / BEND * (self.high - 1 + BEND)
        lower = self.low + t / BEND * (BEND - self.low)
        return torch.where(t > 1 - BEND, upper, torch.where(t < BEND, lower, t))

    def _straight(self, t: Tensor) -> Tensor:
        upper = 1 - BEND + (t - 1 + BEND) / (self.high - 1 + BEND) * BEND
        lower = (t - self.low) / (BEND - self.low) * BEND
        return torch.where(t > 1 - BEND, upper, torch.where(t < BEND, lower, t)).clamp(0, 1)


def _time(signal: Tensor) -> Tensor:
    """The inverse of `alpha_bar`."""
    start = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2)
    return torch.acos(signal.sqrt() * start) / (math.pi / 2) * (1 + OFFSET) - OFFSET
