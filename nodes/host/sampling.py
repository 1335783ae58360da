"""The core's samplers in ComfyUI's hands: its guider runs them, so that all that users patch into a model counts."""

from collections.abc import Callable

import comfy.model_management as management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher, create_model_options_clone, set_model_options_post_cfg_function
from torch import Tensor
from tqdm.auto import tqdm

from ...wuerstchen_core.diffusion.guidance import rescale
from ...wuerstchen_core.diffusion.options import SamplingOptions
from ...wuerstchen_core.diffusion.samplers import SAMPLERS, predict_noise, signal_at
from ...wuerstchen_core.diffusion.schedule import add_noise, sampling_times
from ...wuerstchen_core.pipeline import noise_source
from ...wuerstchen_core.util.notices import tell_once
from .models import TIME
from .previews import previewer_of, with_previews
from .schedule import CosineSampling


def sample(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: Tensor,
    options: SamplingOptions,
    *,
    mask: Tensor | None = None,
    batch_index: list[int] | None = None,
    preview: bool = False,
) -> Tensor:
    """latent (B, C, rows, columns) and CONDITIONINGs -> what a stage draws, the same shape; noise and times are the
    core's. mask (1 or B, 1, rows, columns): where it is 0, `latent` is kept. preview: show the steps even where
    ComfyUI's own previews are off."""
    times = sampling_times(options.steps, options.schedule, options.denoise)
    if times[0] == 0:
        return latent

    def source():
        return noise_source(latent, options.seed, batch_index)

    callback = latent_preview.prepare_callback(model, options.steps)
    if preview and args.preview_method == LatentPreviewMethod.NoPreviews:
        previewer = previewer_of(model.model.latent_format)
        if previewer is None:
            tell_once(
                f"{model.model.STAGE} shows no preview: Würstchen Load Model tells its colours, single files do not"
            )
        else:
            callback = with_previews(callback, previewer, options.steps)
    guider = Guider(model, options)
    guider.set_conds(positive, negative)
    sampled = guider.sample(
        source()(),
        latent,
        CoreSampler(options.sampler, _shifted(model, times), source, model.model.STAGE),
        sigmas(model, times),
        denoise_mask=mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=options.seed,
    )
    return sampled.to(management.intermediate_device(), torch.float32)


def sigmas(model: ModelPatcher, times: list[float]) -> Tensor:
    """Times of the core, the last one 0 -> sigmas of ComfyUI, the last one 0."""
    sampling = model.get_model_object("model_sampling")
    steps = sampling.sigma(torch.tensor(times[:-1], dtype=torch.float64)).float()
    return torch.cat([steps, torch.zeros(1)])


class Guider(comfy.samplers.CFGGuider):
    """ComfyUI's classifier-free guidance, at the times and rescaled as the core's options say."""

    def __init__(self, model: ModelPatcher, options: SamplingOptions):
        super().__init__(model)
        self.options = options
        if options.cfg_rescale:
            changed = create_model_options_clone(model.model_options)
            self.model_options = set_model_options_post_cfg_function(changed, self.rescaled)

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        low, high = self.options.cfg_interval
        guided = low <= model_options["transformer_options"][TIME] <= high
        self.set_cfg(self.options.cfg if guided else 1.0)
        return super().predict_noise(x, timestep, model_options, seed)

    def rescaled(self, told: dict) -> Tensor:
        """What other nodes left of the guided clean latent, last of all."""
        if told["cond_scale"] == 1:
            return told["denoised"]
        return rescale(told["denoised"], told["cond_denoised"], self.options.cfg_rescale)


class CoreSampler(comfy.samplers.Sampler):
    """A sampler of the core by its name.

    source() -> a source of noise, whose first is the one that the run starts with.
    """

    def __init__(self, name: str, times: list[float], source: Callable[[], Callable[[], Tensor]], stage: str):
        self.run, self.times, self.source, self.stage = SAMPLERS[name], times, source, stage

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        masked = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        masked.latent_image, masked.noise = latent_image, noise
        told = extra_args["model_options"].setdefault("transformer_options", {})

        def model(x: Tensor, t: float) -> Tensor:
            signal = signal_at(t)
            sigma = ((1 - signal) / signal) ** 0.5
            told[TIME] = t
            at = torch.full((x.shape[0],), sigma, device=x.device)
            clean = masked(x / signal**0.5, at, denoise_mask=denoise_mask, **extra_args)
            return predict_noise(x, clean, signal)

        def report(state: dict) -> None:
            bar.update()
            if callback is not None:
                callback(state["step"] - 1, state["clean"], state["x"], len(self.times) - 1)

        draw = self.source()
        draw()
        start = noise if self.times[0] == 1 else add_noise(latent_image, noise, self.times[0])
        with tqdm(total=len(self.times) - 1, desc=self.stage, disable=disable_pbar) as bar:
            sampled = self.run(model, start, self.times, lambda: draw().to(noise), report)
        return sampled if denoise_mask is None else torch.where(denoise_mask > 0, sampled, latent_image)


def _shifted(model: ModelPatcher, times: list[float]) -> list[float]:
    """The times at which the core's schedule has the noise that a shifted one has at these."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, CosineSampling) or sampling.shift == 1:
        return times
    noisy = sampling.timestep(sampling.sigma(torch.tensor(times[:-1], dtype=torch.float64)))
    return [*noisy.clamp(0, 1).tolist(), 0.0]
