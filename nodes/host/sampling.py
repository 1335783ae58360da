"""The core's samplers in ComfyUI's hands: its guider runs them, so that all that users patch into a model counts."""

from collections.abc import Callable

import comfy.model_management as management
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...wuerstchen_core.diffusion.samplers import sampler_named
from ...wuerstchen_core.diffusion.schedule import add_noise, alpha_bar, sampling_times
from ...wuerstchen_core.pipeline import noise_source
from .models import TIME
from .schedule import CosineSampling


def sample(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: Tensor,
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler: str,
    schedule: str = "even",
    denoise: float = 1.0,
    mask: Tensor | None = None,
    batch_index: list[int] | None = None,
) -> Tensor:
    """latent (B, C, rows, columns) and CONDITIONINGs -> what a stage draws, the same shape; noise and times are the
    core's. mask (1 or B, 1, rows, columns): where it is 0, `latent` is kept."""
    times = sampling_times(steps, schedule, denoise)
    if times[0] == 0:
        return latent
    draw = noise_source(latent, seed, batch_index)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sampled = guider.sample(
        draw(),
        latent,
        CoreSampler(sampler, _shifted(model, times), draw),
        sigmas(model, times),
        denoise_mask=mask,
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=True,
        seed=seed,
    )
    return sampled.to(management.intermediate_device(), torch.float32)


def sigmas(model: ModelPatcher, times: list[float]) -> Tensor:
    """Times of the core, the last one 0 -> sigmas of ComfyUI, the last one 0."""
    sampling = model.get_model_object("model_sampling")
    steps = sampling.sigma(torch.tensor(times[:-1], dtype=torch.float64)).float()
    return torch.cat([steps, torch.zeros(1)])


class CoreSampler(comfy.samplers.Sampler):
    """A sampler of the core by its name. It ends, as the core does, at time 0, where alpha_bar is 0.9999."""

    def __init__(self, name: str, times: list[float], draw: Callable[[], Tensor]):
        self.run, self.times, self.draw = sampler_named(name), times, draw

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        masked = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        masked.latent_image, masked.noise = latent_image, noise
        options = extra_args["model_options"]
        told = options.setdefault("transformer_options", {})

        def model(x: Tensor, t: float) -> Tensor:
            signal, sigma = _signal_sigma(t)
            scaled = x / signal**0.5
            told[TIME] = t
            at = torch.full((x.shape[0],), sigma, device=x.device)
            clean = masked(scaled, at, denoise_mask=denoise_mask, **extra_args)
            return (scaled - clean) / sigma

        def report(step: int, clean: Tensor) -> None:
            if callback is not None:
                callback(step - 1, clean, clean, len(self.times) - 1)

        start = noise if self.times[0] == 1 else add_noise(latent_image, noise, self.times[0])
        sampled = self.run(model, start, self.times, lambda: self.draw().to(noise), report)
        if denoise_mask is None:
            return sampled
        if "denoise_mask_function" in options:
            last = torch.full((noise.shape[0],), _signal_sigma(self.times[-2])[1], device=noise.device)
            extra = {"model": model_wrap, "sigmas": sigmas}
            denoise_mask = options["denoise_mask_function"](last, denoise_mask, extra_options=extra)
        return torch.lerp(latent_image, sampled, denoise_mask)


def _signal_sigma(t: float) -> tuple[float, float]:
    signal = alpha_bar(torch.tensor(t, dtype=torch.float64)).item()
    return signal, ((1 - signal) / signal) ** 0.5


def _shifted(model: ModelPatcher, times: list[float]) -> list[float]:
    """The times at which the core's schedule has the noise that a shifted one has at these."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, CosineSampling) or sampling.shift == 1:
        return times
    noisy = sampling.timestep(sampling.sigma(torch.tensor(times[:-1], dtype=torch.float64)))
    return [*noisy.clamp(0, 1).tolist(), 0.0]
