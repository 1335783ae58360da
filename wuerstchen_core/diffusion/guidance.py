"""From a network to the `model(x, t)` that a sampler calls: what the run does not change is computed here, once."""

import torch
from torch import Tensor

from .samplers import Model
from .schedule import add_noise


def prepare(network, condition, times: list[float], device, dtype: torch.dtype) -> Model:
    """A noise predictor for one run, from what `network.condition(...)` gave.

    The time embeddings of all steps are computed together; the network computes in `dtype`, the sampler in x's.
    """
    table = network.modulate(torch.tensor(times[:-1], device=device), dtype)
    rows = {t: [modulation[i : i + 1] for modulation in table] for i, t in enumerate(times[:-1])}

    def model(x: Tensor, t: float) -> Tensor:
        return network.denoise(x.to(dtype), rows[t], condition).to(x.dtype)

    return model


def guide(model: Model, cfg: float) -> Model:
    """Classifier-free guidance (arXiv 2207.12598): lerp(unconditional, conditional, cfg).

    The model's condition holds the conditional half of the batch, then the unconditional one.
    """

    def guided(x: Tensor, t: float) -> Tensor:
        conditional, unconditional = model(torch.cat([x, x]), t).chunk(2)
        return torch.lerp(unconditional, conditional, cfg)

    return guided


def keep_outside(model: Model, mask: Tensor, latent: Tensor, noise: Tensor) -> Model:
    """Sample only where the mask is 1; elsewhere the model sees `latent` with as much noise as the time asks for."""

    def masked(x: Tensor, t: float) -> Tensor:
        return model(torch.lerp(add_noise(latent, noise, t), x, mask), t)

    return masked
