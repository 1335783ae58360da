"""Text and picture in, picture out: each stage as a function, and `Wuerstchen`, which runs them one after another.

Pictures here are ComfyUI's: (B, H, W, 3) in [0, 1]. Latents are (B, C, rows, columns). A function computes where the
latent or picture that it is given lies, in `dtype` or else in the precision of the network's weights, and returns
float32. All noise is drawn on the CPU, so that a seed gives the same picture on every device. What comes out is finite,
or a WuerstchenError says which network went beyond its precision.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import tiling
from .checkpoints.load import (
    load_previewer,
    load_semantic_compressor,
    load_stage_a,
    load_stage_b,
    load_stage_c,
    load_text_encoder,
)
from .checkpoints.lora import load_lora
from .checkpoints.sets import MINI, find_distilled, find_set
from .diffusion.guidance import guide, keep_outside, prepare, within
from .diffusion.inputs import check_latent, checked_mask, join_texts, shape_text
from .diffusion.noise import noise_of_each, noise_source
from .diffusion.options import MAX_CFG, MAX_SEED, MIN_SEED, STAGE_B, STAGE_C, SamplingOptions
from .diffusion.samplers import SAMPLERS
from .diffusion.schedule import MAX_STEPS, add_noise, sampling_times
from .geometry import Geometry
from .models.compiled import compile_networks
from .models.defaults import Defaults, defaults_of
from .models.lora import LoRA, apply_loras
from .models.previewer import Previewer
from .models.semantic_compressor import SemanticCompressor
from .models.stage_a import VQGAN
from .models.stage_b import DiffNeXt
from .models.stage_c import Prior
from .models.text_cache import TextCache
from .models.text_encoder import TextEncoder
from .offload import Offload, must_offload
from .util import checks
from .util.errors import WuerstchenError
from .util.notices import tell_once
from .util.pictures import as_images
from .util.precision import Overflow, check_finite, dtype_of, fast_dtype, in_float32
from .util.resampling import cover

DENOISE = 0.6  # of a picture to start from, where nothing else is asked for
MAX_BATCH = 1024

Progress = Callable[[int, int, Tensor], None]  # (step from 1, steps, clean latent predicted at that step)


@torch.inference_mode()
def compress(compressor: SemanticCompressor, image: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """image (B, H, W, 3), sides multiples of 8 -> its latent in Stage C's space (B, 16, p, q)"""
    planes, geometry = _padded(image)
    planes = F.interpolate(planes, size=geometry.compressor, mode="bicubic", antialias=True).clamp(0, 1)
    dtype = dtype or dtype_of(compressor)
    features = check_finite(compressor(planes.to(dtype)).float(), "the semantic compressor", dtype)
    return compressor.config.latent_space.from_features(features)


@torch.inference_mode()
def sample_stage_c(
    stage_c: Prior,
    latent: Tensor,
    text: Tensor,
    negative: Tensor | None = None,
    options: SamplingOptions = STAGE_C,
    *,
    mask: Tensor | None = None,
    batch_index: list[int] | None = None,
    seeds: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    **changed,
) -> Tensor:
    """Text -> latent in Stage C's space (B, 16, p, q).

    Args:
        latent: (B, 16, p, q), what to start from; it counts where denoise < 1 or a mask is given.
        text, negative: (1 or B, L, text_width) from the text encoder; negative is needed unless cfg is 1.
        options, changed: how to sample; `changed` are fields of SamplingOptions that differ (`steps=20, seed=3`).
        mask: (1 or B, 1, p, q) in [0, 1]; where it is 0, `latent` is kept, and between 0 and 1 the predicted clean
            latent is blended with it at every step.
        batch_index: which pictures of a larger batch these are: they get the noise that they would get there.
        seeds: one for each picture in the place of the options' seed: each gets the noise that it would get alone.

    Raises:
        WuerstchenError: the text comes from an encoder of another width, an option is out of its range, a size does not
            fit, or the network went beyond its precision.
    """
    options = replace(options, **changed)
    if options.cfg != 1 and negative is None:
        raise WuerstchenError(f"cfg {options.cfg} needs a negative prompt's encoding (that of an empty text will do)")
    dtype = dtype or dtype_of(stage_c)
    check_latent("Stage C", latent, stage_c.config.latent_channels)
    texts = join_texts("Stage C", stage_c.config.text_width, latent.shape[0], text, negative, options.cfg != 1)
    texts = texts.to(latent.device, dtype)

    def condition(rows: slice):
        return stage_c.condition(texts[rows])

    sampled = _sample("Stage C", stage_c, condition, latent, options, mask, batch_index, seeds, dtype, progress)
    return check_finite(sampled, "Stage C", dtype)


@torch.inference_mode()
def sample_stage_b(
    stage_b: DiffNeXt,
    semantic: Tensor,
    geometry: Geometry,
    text: Tensor | None = None,
    negative: Tensor | None = None,
    options: SamplingOptions = STAGE_B,
    *,
    latent: Tensor | None = None,
    mask: Tensor | None = None,
    batch_index: list[int] | None = None,
    seeds: Sequence[int] | None = None,
    tile: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    **changed,
) -> Tensor:
    """Latent of Stage C -> latent of Stage A (B, 4, h, w) for a picture of the geometry's size.

    Where the network overflows in float16 it is run again, in float32, and that is told once.

    Args:
        semantic: (B, 16, p, q) in Stage C's space, from Stage C or from the compressor.
        text, negative: (1 or B, L, text_width). None is no text: zero states, or what the network was trained with
            (`StageBConfig.text_absent`). With guidance on, the unconditional half gets a zero semantic latent.
        latent: (B, 4, h, w), what to start from where denoise < 1 or a mask (1 or B, 1, h, w) is given.
        tile: how far attention sees, in pixels of the picture; 0 is the whole of it, None is 1024 pixels where a side
            has more than 1536.
        The others are those of `sample_stage_c`.

    Raises:
        WuerstchenError: the text comes from an encoder of another width, an option is out of its range, a size does not
            fit, or the network went beyond its precision.
    """
    options = replace(options, **changed)
    dtype = dtype or dtype_of(stage_b)
    config, guided = stage_b.config, options.cfg != 1
    check_latent("Stage B, semantic", semantic, config.semantic_channels)
    window = tiling.attention_window(*geometry.stage_a, tiling.check_tile(tile))
    batch, device = semantic.shape[0], semantic.device
    if latent is None:
        latent = torch.zeros(batch, config.latent_channels, *geometry.stage_a, device=device)
    check_latent("Stage B", latent, config.latent_channels, (batch, *geometry.stage_a))
    features = config.latent_space.to_features(semantic.float())
    if guided:
        features = torch.cat([features, torch.zeros_like(features)])
    texts = None
    either = negative if text is None else text
    if either is not None:
        nothing = torch.zeros_like(either)
        text, negative = (nothing if one is None else one for one in (text, negative))
        texts = join_texts("Stage B", config.text_width, batch, text, negative, guided).to(device)

    def run(dtype: torch.dtype) -> Tensor:
        def condition(rows: slice):
            given = None if texts is None else texts[rows].to(dtype)
            return stage_b.condition(features[rows].to(dtype), given, latent.shape[-2:], window)

        return _sample("Stage B", stage_b, condition, latent, options, mask, batch_index, seeds, dtype, progress)

    try:
        return check_finite(run(dtype), "Stage B", dtype)
    except Overflow:
        if dtype != torch.float16:
            raise
    tell_once("Stage B overflows in float16: it goes on in float32, slower and with more memory")
    with in_float32(stage_b):
        return check_finite(run(torch.float32), "Stage B", torch.float32)


def _sample(
    name: str, network, condition, latent, options: SamplingOptions, mask, batch_index, seeds, dtype, progress
) -> Tensor:
    latent = latent.float()
    if mask is not None:
        mask = checked_mask(mask, latent)
    draw = noise_source(latent, options.seed, batch_index) if seeds is None else noise_of_each(latent, seeds)
    times = sampling_times(options.steps, options.schedule, options.denoise)
    if times[0] == 0:
        return latent
    model = prepare(network, condition(slice(None)), times, latent.device, dtype)
    if options.cfg != 1:
        model = guide(model, options.cfg, options.cfg_rescale)
        low, high = options.cfg_interval
        if not all(low <= t <= high for t in times[:-1]):
            alone = prepare(network, condition(slice(len(latent))), times, latent.device, dtype)
            model = within(options.cfg_interval, model, alone)
    noise = draw()
    start = noise if times[0] == 1 else add_noise(latent, noise, times[0])
    if mask is not None:
        model = keep_outside(model, mask, latent, noise)

    def report(state: dict) -> None:
        if dtype == torch.float16:
            check_finite(state["clean"], name, dtype)
        if progress is not None:
            progress(state["step"], options.steps, state["clean"])

    sampled = SAMPLERS[options.sampler](model, start, times, draw, report)
    return sampled if mask is None else torch.where(mask > 0, sampled, latent)


@torch.inference_mode()
def encode(stage_a: VQGAN, image: Tensor, dtype: torch.dtype | None = None, tile: int | None = None) -> Tensor:
    """image (B, H, W, 3), sides multiples of 8 -> latent of Stage A (B, 4, h, w)

    `tile` is the side, in pixels, of the parts that are encoded one after another, with the same result; 0 is the
    whole picture, None what memory allows.
    """
    tile = tiling.check_tile(tile)
    planes, _ = _padded(image)
    dtype = dtype or dtype_of(stage_a)
    return check_finite(tiling.encode(stage_a, planes.to(dtype), tile).float(), "Stage A", dtype)


@torch.inference_mode()
def decode(
    stage_a: VQGAN,
    latent: Tensor,
    geometry: Geometry | None = None,
    dtype: torch.dtype | None = None,
    tile: int | None = None,
) -> Tensor:
    """latent of Stage A (B, 4, h, w) -> image (B, H, W, 3) in [0, 1] of the geometry's size, or the whole of it

    `tile` is as in `encode`.
    """
    tile = tiling.check_tile(tile)
    dtype = dtype or dtype_of(stage_a)
    planes = check_finite(tiling.decode(stage_a, latent.to(dtype), tile).float(), "Stage A", dtype)
    if geometry is not None:
        planes = _crop(planes, geometry)
    return rearrange(planes.clamp_(0, 1), "b c h w -> b h w c")


@torch.inference_mode()
def preview(previewer: Previewer, latent: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """latent in Stage C's space (B, 16, p, q) -> small image (B, 8p, 8q, 3) in [0, 1], margins and all

    Raises:
        WuerstchenError: the previewer is for latents of another number of channels, or went beyond its precision.
    """
    channels = previewer.config.latent_channels
    if latent.shape[1] != channels:
        raise WuerstchenError(f"this previewer is for latents of {channels} channels, not of {latent.shape[1]}")
    dtype = dtype or dtype_of(previewer)
    planes = check_finite(previewer(latent.to(dtype)).float(), "the previewer", dtype)
    return rearrange(planes.clamp(0, 1), "b c h w -> b h w c")


def _padded(image: Tensor) -> tuple[Tensor, Geometry]:
    """image (B, H, W, 3) -> (B, 3, rows, columns) of the size that the networks work on, and the picture's sizes"""
    if image.dim() != 4 or image.shape[-1] != 3 or len(image) == 0:
        raise WuerstchenError(f"image has the shape {shape_text(image)}: it must be (B, H, W, 3)")
    geometry = Geometry(width=image.shape[2], height=image.shape[1])
    return F.pad(rearrange(image, "b h w c -> b c h w").float(), geometry.margins, mode="replicate"), geometry


def _crop(planes: Tensor, geometry: Geometry) -> Tensor:
    left, _, top, _ = geometry.margins
    return planes[:, :, top : top + geometry.height, left : left + geometry.width]


def fit(image: Tensor, geometry: Geometry) -> Tensor:
    """image (B, H, W, C) -> (B, height, width, C): scaled to cover the geometry's size, its middle cut out"""
    return cover(image, geometry.height, geometry.width)


class Sampling(NamedTuple):
    """How a picture is drawn: the options of both stages, and the LoRAs of those that are distilled."""

    stage_c: SamplingOptions
    stage_b: SamplingOptions
    distilled: Mapping[str, LoRA]

    @property
    def settings(self) -> dict[str, Any]:
        """What `Wuerstchen.generate` is given to draw like this, each by its name; `sampler_b` where it is another."""
        settings = {
            "steps_c": self.stage_c.steps,
            "cfg_c": self.stage_c.cfg,
            "steps_b": self.stage_b.steps,
            "cfg_b": self.stage_b.cfg,
            "sampler": self.stage_c.sampler,
            "schedule": self.stage_c.schedule,
            "schedule_b": self.stage_b.schedule,
            "cfg_interval": self.stage_c.cfg_interval,
            "cfg_rescale": self.stage_c.cfg_rescale,
            "distilled": bool(self.distilled),
        }
        other = {"sampler_b": self.stage_b.sampler} if self.stage_b.sampler != self.stage_c.sampler else {}
        return settings | other


@dataclass
class Wuerstchen:
    """A whole set of networks. `text_encoder_c` and `text_encoder_b` may be the same one.

    The previewer is optional, and so is `text_encoder_b`: without it Stage B reads no text, which hardly matters.
    `distilled` has LoRAs for "stage_c" and "stage_b", or for one of them, with which they draw in a few steps.
    With `offload` the networks lie in the machine's memory and `generate` has one at a time on the offload's device.
    """

    stage_a: VQGAN
    stage_b: DiffNeXt
    stage_c: Prior
    text_encoder_c: TextEncoder
    semantic_compressor: SemanticCompressor
    text_encoder_b: TextEncoder | None = None
    previewer: Previewer | None = None
    distilled: dict[str, LoRA] = field(default_factory=dict)
    offload: Offload | None = None
    _encode: TextCache = field(default_factory=TextCache, init=False, repr=False, compare=False)

    def __post_init__(self):
        for stage, lora in self.distilled.items():
            lora.check(getattr(self, stage))
            _few_steps(lora)

    @classmethod
    def from_files(
        cls,
        *,
        stage_a: str | Path,
        stage_b: str | Path,
        stage_c: str | Path,
        text_encoder_c: str | Path,
        semantic_compressor: str | Path,
        text_encoder_b: str | Path | None = None,
        previewer: str | Path | None = None,
        distilled: Mapping[str, str | Path] | None = None,
        device="cpu",
        dtype: torch.dtype | None = None,
        offload: bool | None = False,
    ) -> "Wuerstchen":
        """One file per network, all in `dtype`; by default in float32, but for Stage C and Stage B, which are in the
        device's `fast_dtype`. Text encoders are in float32 in the place of bfloat16, which is too coarse for them.

        With `offload` only the network at work is on the device; None is where the device cannot hold all of them.

        Raises:
            WuerstchenError: a file is not what its name here says, or it is the CPU that is to be relieved.
        """
        target = torch.device(device)
        if offload and target.type == "cpu":
            raise WuerstchenError(
                "offload is set, but the device is the CPU, where all networks lie anyway: name another"
            )
        device = target if offload is False else torch.device("cpu")
        fast, dtype = dtype or fast_dtype(target), dtype or torch.float32
        exact = torch.float32 if dtype == torch.bfloat16 else dtype
        encoder_c = load_text_encoder(text_encoder_c, device, exact)
        encoder_b: TextEncoder | None = encoder_c
        if text_encoder_b is None:
            encoder_b = None
        elif Path(text_encoder_b) != Path(text_encoder_c):
            encoder_b = load_text_encoder(text_encoder_b, device, exact)
        model = cls(
            stage_a=load_stage_a(stage_a, device, dtype),
            stage_b=load_stage_b(stage_b, device, fast),
            stage_c=load_stage_c(stage_c, device, fast),
            text_encoder_c=encoder_c,
            text_encoder_b=encoder_b,
            semantic_compressor=load_semantic_compressor(semantic_compressor, device, dtype),
            previewer=None if previewer is None else load_previewer(previewer, device, dtype),
            distilled={stage: load_lora(path) for stage, path in (distilled or {}).items()},
        )
        networks = [one for one in vars(model).values() if isinstance(one, nn.Module)]
        if offload or offload is None and must_offload(networks, target):
            return replace(model, offload=Offload(target))
        for network in networks:
            network.to(target)
        return model

    @classmethod
    def from_folder(
        cls, folder: str | Path, device="cpu", dtype: torch.dtype | None = None, offload: bool | None = False
    ) -> "Wuerstchen":
        """A folder that holds the whole set under the names of `SET`, and those of `DISTILLED` that it has."""
        return cls.from_files(
            **find_set(folder), distilled=find_distilled(folder), device=device, dtype=dtype, offload=offload
        )

    @classmethod
    def from_file(
        cls, path: str | Path, device="cpu", dtype: torch.dtype | None = None, offload: bool | None = False
    ) -> "Wuerstchen":
        """A bundle: the whole set, and its distilled networks if it has any, in one file."""
        return cls.from_folder(path, device, dtype, offload)

    @classmethod
    def mini(cls, device="cpu", dtype: torch.dtype | None = None) -> "Wuerstchen":
        """The model in the repository: emoji at 256x256."""
        return cls.from_folder(MINI, device, dtype)

    @property
    def defaults(self) -> Defaults:
        """The size, the guidance and the few steps that suit this set."""
        return defaults_of(self.stage_c.config)

    def compile(self) -> "Wuerstchen":
        """The same set, whose Stages C, B and A run compiled (`torch.compile`, block by block; CUDA graphs on a GPU).

        The first picture of a size, or of a batch, takes minutes longer on a CPU. Raises WuerstchenError where nothing
        can be compiled.
        """
        if self.offload is not None:
            raise WuerstchenError("compiled networks stay on the device: compile them, or offload them, not both")
        compile_networks([self.stage_c, self.stage_b, self.stage_a])
        return self

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        batch_size: int | None = None,
        seed: int = STAGE_C.seed,
        steps_c: int | None = None,
        cfg_c: float | None = None,
        steps_b: int | None = None,
        cfg_b: float | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        schedule_b: str | None = None,
        cfg_interval: tuple[float, float] | None = None,
        cfg_rescale: float | None = None,
        sampler_b: str | None = None,
        distilled: bool | None = None,
        image=None,
        denoise: float | None = None,
        seed_b: int | None = None,
        tile: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Tensor:
        """Prompt, and a picture if there is one -> pictures (batch_size, height, width, 3) in [0, 1].

        Args:
            prompt, negative_prompt: one text each; without guidance (cfg 1) the negative one is not used.
            negative_prompt, steps_c, cfg_c, … sampler_b: what is not given has its default (see `sampling`).
            distilled: whether the set's distilled networks draw; by default if it has any and none of those is given.
            width, height: pixels, multiples of 8; by default those of `defaults`.
            batch_size: how many pictures; by default as many as `image` has, or one.
            cfg_c, cfg_b: strength of the guidance; 1 is off. Stage C's is by default that of `defaults`.
            seed_b: Stage B's seed, by default the same.
            sampler: of both stages; sampler_b: of Stage B, by default the same.
            schedule, schedule_b: where each stage's steps lie.
            cfg_interval: the times, from 0 (picture) to 1 (noise), between which Stage C is guided; without guidance a
                step is twice as fast.
            cfg_rescale: against colours that Stage C's guidance makes too strong, 0 (off) to 1.
            image: what `as_images` takes: a tensor or array (H, W, C) or (B, H, W, C), or a PIL image; scaled to cover
                the size asked for, and its middle used. Fewer than batch_size are used in turn.
            denoise: with an image, how much of it Stage C redraws: 0 (a variation: Stage B draws it anew) to 1 (all),
                by default 0.6.
            tile: pixels a side of the tiles of Stage A and of the windows of Stage B's attention, a multiple of 64 from
                256 on; 0 is the whole picture. By default Stage A takes what memory allows, and Stage B 1024 where a
                side has more than 1536 pixels.
            progress: called as (stage, step, steps) after each step.

        Raises:
            WuerstchenError: an option is of another type or out of its range, or contradicts another; before any
                network runs.
        """
        own = self.defaults
        geometry = Geometry(own.side if width is None else width, own.side if height is None else height)
        tiling.check_tile(tile)
        checks.text("prompt", prompt)
        if negative_prompt is not None:
            checks.text("negative_prompt", negative_prompt)
        if progress is not None and not callable(progress):
            raise WuerstchenError(f"progress is {checks.shown(progress)}: it must be a function")
        if image is None:
            if denoise is not None and checks.real_number("denoise", denoise, 0.0, 1.0) != 1:
                raise WuerstchenError(f"denoise is {checks.shown(denoise)}, but there is no image to start from")
            count, denoise = 1, 1.0
        else:
            image = as_images(image)
            count, denoise = len(image), DENOISE if denoise is None else denoise
        batch = checks.whole_number("batch_size", count if batch_size is None else batch_size, 1, MAX_BATCH)
        if batch % count:
            raise WuerstchenError(f"batch_size is {batch}, but image holds {count} pictures: leave batch_size out")
        sampling = self.sampling(
            negative_prompt=negative_prompt,
            steps_c=steps_c,
            cfg_c=cfg_c,
            steps_b=steps_b,
            cfg_b=cfg_b,
            sampler=sampler,
            schedule=schedule,
            schedule_b=schedule_b,
            cfg_interval=cfg_interval,
            cfg_rescale=cfg_rescale,
            sampler_b=sampler_b,
            distilled=distilled,
        )
        options_c = replace(sampling.stage_c, denoise=denoise, seed=seed)
        seed_b = seed if seed_b is None else checks.whole_number("seed_b", seed_b, MIN_SEED, MAX_SEED)
        options_b = replace(sampling.stage_b, seed=seed_b)

        def report(stage: str) -> Progress | None:
            return progress and (lambda step, steps, clean: progress(stage, step, steps))

        guided_c = options_c.cfg != 1 and options_c.denoise > 0
        text_c, text_b = self._read(prompt, negative_prompt or "", guided_c, options_b.cfg != 1)
        if image is None:
            latent = torch.zeros(batch, self.stage_c.config.latent_channels, *geometry.stage_c, device=self.device)
        else:
            with self._at_work(self.semantic_compressor, self.stage_c):
                latent = compress(self.semantic_compressor, fit(image.to(self.device), geometry))
            latent = latent.repeat(batch // count, 1, 1, 1)
        with self.drawn_with(sampling):
            with self._at_work(self.stage_c, self.stage_b):
                semantic = sample_stage_c(
                    self.stage_c, latent, text_c[0], text_c[-1], options_c, progress=report("Stage C")
                )
            text, negative = [*text_b, None, None][:2]
            with self._at_work(self.stage_b, self.stage_a):
                latent = sample_stage_b(
                    self.stage_b, semantic, geometry, text, negative, options_b, tile=tile, progress=report("Stage B")
                )
        with self._at_work(self.stage_a):
            return decode(self.stage_a, latent, geometry, tile=tile)

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self.stage_c.projection.weight.device if self.offload is None else self.offload.device

    def _at_work(self, network: nn.Module, then: nn.Module | None = None) -> AbstractContextManager:
        return nullcontext() if self.offload is None else self.offload(network, then)

    def sampling(
        self,
        *,
        negative_prompt: str | None = None,
        steps_c: int | None = None,
        cfg_c: float | None = None,
        steps_b: int | None = None,
        cfg_b: float | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        schedule_b: str | None = None,
        cfg_interval: tuple[float, float] | None = None,
        cfg_rescale: float | None = None,
        sampler_b: str | None = None,
        distilled: bool | None = None,
    ) -> Sampling:
        """How `generate` draws with these arguments. Raises WuerstchenError as it does."""
        for_c: dict = {"steps": steps_c, "cfg": cfg_c, "sampler": sampler, "schedule": schedule}
        for_c |= {"cfg_interval": cfg_interval, "cfg_rescale": cfg_rescale}
        for_b = {"steps": steps_b, "cfg": cfg_b, "sampler": sampler_b or sampler, "schedule": schedule_b}
        given_c, given_b = _given(for_c), _given(for_b)
        if distilled is None:
            distilled = negative_prompt is None and not given_c and not given_b
        elif distilled and not self.distilled:
            raise WuerstchenError("distilled is set, but this set has no distilled networks: leave it out")
        loras = self.distilled if distilled else {}
        few = {stage: _few_steps(lora) for stage, lora in loras.items()}
        stage_c = few.get("stage_c", replace(STAGE_C, cfg=self.defaults.cfg))
        stage_b = few.get("stage_b", self.defaults.few_steps_b if few else STAGE_B)
        return Sampling(_options("c", stage_c, given_c), _options("b", stage_b, given_b), loras)

    @contextmanager
    def drawn_with(self, sampling: Sampling) -> Iterator[None]:
        """Within the context the networks are the distilled ones that `sampling` has."""
        with ExitStack() as stack:
            for stage, lora in sampling.distilled.items():
                stack.enter_context(apply_loras(getattr(self, stage), [(lora, 1.0)]))
            yield

    def _read(self, prompt: str, negative: str, guided_c: bool, guided_b: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The states of the prompt and, with guidance, of the negative one; for Stage C, then for Stage B."""

        def read(encoder: TextEncoder, guided: bool, then: nn.Module) -> list[Tensor]:
            with self._at_work(encoder, then):
                return list(self._encode(encoder, [prompt, negative] if guided else [prompt]).split(1))

        if self.text_encoder_b is self.text_encoder_c:
            both = read(self.text_encoder_c, guided_c or guided_b, self.stage_c)
            return both, both
        text_b = [] if self.text_encoder_b is None else read(self.text_encoder_b, guided_b, self.text_encoder_c)
        return read(self.text_encoder_c, guided_c, self.stage_c), text_b


def _given(options: Mapping) -> dict:
    return {name: value for name, value in options.items() if value is not None}


def _options(stage: str, defaults: SamplingOptions, given: dict) -> SamplingOptions:
    """Of a stage, "c" or "b", whose own options carry its letter in `Wuerstchen.generate`."""
    if "steps" in given:
        checks.whole_number(f"steps_{stage}", given["steps"], 1, MAX_STEPS)
    if "cfg" in given:
        checks.real_number(f"cfg_{stage}", given["cfg"], -MAX_CFG, MAX_CFG)
    return replace(defaults, **given)


def _few_steps(lora: LoRA) -> SamplingOptions:
    """How to sample with a distilled network's LoRA. Raises WuerstchenError if its file does not say that."""
    if "steps" not in lora.sampling or lora.sampling.keys() - {"steps", "cfg", "sampler"}:
        raise WuerstchenError(
            f"{lora.path}: its metadata does not say how to sample with it (steps, cfg, sampler): expected the LoRA of "
            "a distilled network, as wuerstchen train distill writes it"
        )
    try:
        return replace(SamplingOptions(cfg=1.0, sampler="lcm"), **lora.sampling)
    except WuerstchenError as error:
        raise WuerstchenError(f"{lora.path}: its sampling metadata: {error}") from error
