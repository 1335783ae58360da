"""From a network to the `model(x, t)` that a sampler calls: what the run does not change is computed here, once."""

import torch
from torch import Tensor

from .samplers import Model, predict_clean, predict_noise, signal_at
from .schedule import add_noise


def prepare(network, condition, times: list[float], device, dtype: torch.dtype) -> Model:
    """A noise predictor for one run, from what `network.condition(...)` gave.

    The time embeddings of all steps are computed together; the network computes in `dtype`, the sampler in x's.
    """
    table = network.modulate(torch.tensor(times[:-1], device=device), dtype)
    rows = {t: [modulation[i : i + 1] for modulation in table] for i, t in enumerate(times[:-1])}

    def model(x: Tensor, t: float) -> Tensor:
        return network.denoise(x, rows[t], condition)

    return model


def guide(model: Model, cfg: float, rescaled: float = 0.0) -> Model:
    """Classifier-free guidance (arXiv 2207.12598): lerp(unconditional, conditional, cfg), `rescaled` by this share.

    The model's condition holds the conditional half of the batch, then the unconditional one.
    """

    def guided(x: Tensor, t: float) -> Tensor:
        conditional, unconditional = model(torch.cat([x, x]), t).chunk(2)
        noise = torch.lerp(unconditional, conditional, cfg)
        if rescaled == 0:
            return noise
        signal = signal_at(t)
        clean = rescale(predict_clean(x, noise, signal), predict_clean(x, conditional, signal), rescaled)
        return predict_noise(x, clean, signal)

    return guided


def within(interval: tuple[float, float], guided: Model, unguided: Model) -> Model:
    """Guidance at the times of a closed interval only (arXiv 2404.07724)."""
    low, high = interval
    return lambda x, t: (guided if low <= t <= high else unguided)(x, t)


def rescale(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """The guided clean latent (B, ...) with its standard deviation brought back to the conditional one's, by a share.

    Source: arXiv 2305.08891, section 3.4, of the predicted clean latent.
    """
    axes = tuple(range(1, guided.dim()))
    spread = guided.std(dim=axes, keepdim=True)
    ratio = torch.where(spread > 0, conditional.std(dim=axes, keepdim=True) / spread, 1.0)
    return guided * (1 - share + share * ratio)


def keep_outside(model: Model, mask: Tensor, latent: Tensor, noise: Tensor) -> Model:
    """Sample where the mask is 1 and keep `latent` where it is 0; what lies between is blended at every step.

    As in ComfyUI, the model sees x blended with `latent` at the time's noise level, and the clean latent that it
    predicts from that is blended with `latent`. What comes back is the noise in x for which that is the clean latent.
    """

    def masked(x: Tensor, t: float) -> Tensor:
        signal = signal_at(t)
        seen = torch.lerp(add_noise(latent, noise, t), x, mask)
        clean = torch.lerp(latent, predict_clean(seen, model(seen, t), signal), mask)
        return predict_noise(x, clean, signal)

    return masked
