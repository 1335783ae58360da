"""Text and picture in, picture out: each stage as a function, and `Wuerstchen`, which runs them one after another.

Pictures here are ComfyUI's: (B, H, W, 3) in [0, 1]. Latents are (B, C, rows, columns). A function computes where the
latent or picture that it is given lies, in `dtype` or else in the precision of the network's weights, and returns
float32. All noise is drawn on the CPU, so that a seed gives the same picture on every device. What comes out is finite,
or a WuerstchenError says which network went beyond its precision.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .checkpoints.load import (
    load_previewer,
    load_semantic_compressor,
    load_stage_a,
    load_stage_b,
    load_stage_c,
    load_text_encoder,
)
from .checkpoints.sets import MINI, find_set
from .diffusion.guidance import guide, keep_outside, prepare
from .diffusion.samplers import sampler_named
from .diffusion.schedule import add_noise, sampling_times
from .geometry import Geometry
from .models.previewer import Previewer
from .models.semantic_compressor import SemanticCompressor
from .models.stage_a import VQGAN
from .models.stage_b import DiffNeXt
from .models.stage_c import Prior
from .models.text_encoder import TextEncoder
from .util.errors import WuerstchenError
from .util.finite import is_finite

Progress = Callable[[int, int, Tensor], None]  # (step from 1, steps, clean latent predicted at that step)


@torch.inference_mode()
def compress(compressor: SemanticCompressor, image: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """image (B, H, W, 3), sides multiples of 8 -> its latent in Stage C's space (B, 16, p, q)"""
    geometry = Geometry(width=image.shape[2], height=image.shape[1])
    planes = F.pad(_planes(image), geometry.margins, mode="replicate")
    planes = F.interpolate(planes, size=geometry.compressor, mode="bicubic", antialias=True).clamp(0, 1)
    dtype = dtype or _dtype(compressor)
    features = _finite(compressor(planes.to(dtype)).float(), "the semantic compressor", dtype)
    return compressor.config.latent_space.from_features(features)


@torch.inference_mode()
def sample_stage_c(
    stage_c: Prior,
    latent: Tensor,
    text: Tensor,
    negative: Tensor | None = None,
    *,
    steps: int = 30,
    cfg: float = 4.0,
    sampler: str = "ddpm",
    schedule: str = "even",
    denoise: float = 1.0,
    seed: int = 0,
    mask: Tensor | None = None,
    batch_index: list[int] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Text -> latent in Stage C's space (B, 16, p, q).

    Args:
        latent: (B, 16, p, q), what to start from; it counts where denoise < 1 or a mask is given.
        text, negative: (1 or B, L, text_width) from the text encoder; negative is needed unless cfg is 1.
        cfg: strength of the guidance; 1 is off.
        denoise: in [0, 1]; 1 starts from pure noise, less keeps that much more of `latent`.
        mask: (1 or B, 1, p, q) in [0, 1]; where it is 0, `latent` is kept.
        batch_index: which pictures of a larger batch these are: they get the noise that they would get there.

    Raises:
        WuerstchenError: the text comes from an encoder of another width, an option is out of its range, or the network
            went beyond its precision.
    """
    if cfg != 1 and negative is None:
        raise WuerstchenError(f"cfg {cfg} needs a negative prompt's encoding (that of an empty text will do)")
    dtype = dtype or _dtype(stage_c)
    texts = _texts(text, negative if cfg != 1 else None, latent.shape[0], stage_c.config.text_width, "Stage C")
    condition = stage_c.condition(texts.to(latent.device, dtype))
    times = sampling_times(steps, schedule, denoise)
    draw = noise_source(latent, seed, batch_index)
    sampled = _sample(stage_c, condition, latent, times, cfg, sampler, draw, mask, dtype, progress)
    return _finite(sampled, "Stage C", dtype)


@torch.inference_mode()
def sample_stage_b(
    stage_b: DiffNeXt,
    semantic: Tensor,
    geometry: Geometry,
    text: Tensor | None = None,
    negative: Tensor | None = None,
    *,
    steps: int = 12,
    cfg: float = 1.0,
    sampler: str = "ddpm",
    schedule: str = "even",
    denoise: float = 1.0,
    seed: int = 0,
    latent: Tensor | None = None,
    mask: Tensor | None = None,
    batch_index: list[int] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Latent of Stage C -> latent of Stage A (B, 4, h, w) for a picture of the geometry's size.

    Args:
        semantic: (B, 16, p, q) in Stage C's space, from Stage C or from the compressor.
        text, negative: (1 or B, L, text_width), or None for none. With guidance on, the unconditional half gets a zero
            semantic latent.
        latent: (B, 4, h, w), what to start from where denoise < 1 or a mask (1 or B, 1, h, w) is given.
        The others are those of `sample_stage_c`.

    Raises:
        WuerstchenError: the text comes from an encoder of another width, an option is out of its range, or the network
            went beyond its precision.
    """
    dtype = dtype or _dtype(stage_b)
    batch, device = semantic.shape[0], semantic.device
    if latent is None:
        latent = torch.zeros(batch, stage_b.config.latent_channels, *geometry.stage_a, device=device)
    features = stage_b.config.latent_space.to_features(semantic.float())
    if cfg != 1:
        features = torch.cat([features, torch.zeros_like(features)])
        if text is not None and negative is None:
            negative = torch.zeros_like(text)
    texts = None
    if text is not None:
        width = stage_b.config.text_width
        texts = _texts(text, negative if cfg != 1 else None, batch, width, "Stage B").to(device, dtype)
    condition = stage_b.condition(features.to(dtype), texts, latent.shape[-2:])
    times = sampling_times(steps, schedule, denoise)
    draw = noise_source(latent, seed, batch_index)
    sampled = _sample(stage_b, condition, latent, times, cfg, sampler, draw, mask, dtype, progress)
    return _finite(sampled, "Stage B", dtype)


@torch.inference_mode()
def encode(stage_a: VQGAN, image: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """image (B, H, W, 3), sides multiples of 8 -> latent of Stage A (B, 4, h, w)"""
    geometry = Geometry(width=image.shape[2], height=image.shape[1])
    planes = F.pad(_planes(image), geometry.margins, mode="replicate")
    dtype = dtype or _dtype(stage_a)
    return _finite(stage_a.encode(planes.to(dtype)).float(), "Stage A", dtype)


@torch.inference_mode()
def decode(
    stage_a: VQGAN, latent: Tensor, geometry: Geometry | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """latent of Stage A (B, 4, h, w) -> image (B, H, W, 3) in [0, 1] of the geometry's size, or the whole of it"""
    dtype = dtype or _dtype(stage_a)
    planes = _finite(stage_a.decode(latent.to(dtype)).float(), "Stage A", dtype)
    if geometry is not None:
        planes = _crop(planes, geometry)
    return rearrange(planes.clamp(0, 1), "b c h w -> b h w c")


@torch.inference_mode()
def preview(previewer: Previewer, latent: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """latent in Stage C's space (B, 16, p, q) -> small image (B, 8p, 8q, 3) in [0, 1], margins and all

    Raises:
        WuerstchenError: the previewer is for latents of another number of channels, or went beyond its precision.
    """
    channels = previewer.config.latent_channels
    if latent.shape[1] != channels:
        raise WuerstchenError(f"this previewer is for latents of {channels} channels, not of {latent.shape[1]}")
    dtype = dtype or _dtype(previewer)
    planes = _finite(previewer(latent.to(dtype)).float(), "the previewer", dtype)
    return rearrange(planes.clamp(0, 1), "b c h w -> b h w c")


def fit(image: Tensor, geometry: Geometry) -> Tensor:
    """image (B, H, W, 3) scaled to cover the geometry's size, its middle cut out"""
    height, width = image.shape[1:3]
    scale = max(geometry.height / height, geometry.width / width)
    size = max(geometry.height, round(height * scale)), max(geometry.width, round(width * scale))
    top, left = (size[0] - geometry.height) // 2, (size[1] - geometry.width) // 2
    planes = F.interpolate(_planes(image), size=size, mode="bicubic", antialias=True).clamp(0, 1)
    planes = planes[:, :, top : top + geometry.height, left : left + geometry.width]
    return rearrange(planes, "b c h w -> b h w c")


@dataclass
class Wuerstchen:
    """A whole set of networks. `text_encoder_c` and `text_encoder_b` may be the same one; the previewer is optional."""

    stage_a: VQGAN
    stage_b: DiffNeXt
    stage_c: Prior
    text_encoder_c: TextEncoder
    text_encoder_b: TextEncoder
    semantic_compressor: SemanticCompressor
    previewer: Previewer | None = None

    @classmethod
    def from_files(
        cls,
        *,
        stage_a: str | Path,
        stage_b: str | Path,
        stage_c: str | Path,
        text_encoder_c: str | Path,
        text_encoder_b: str | Path,
        semantic_compressor: str | Path,
        previewer: str | Path | None = None,
        device="cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Wuerstchen":
        """A file a network. Raises WuerstchenError for a file that is not what its name here says."""
        encoder_c = load_text_encoder(text_encoder_c, device, dtype)
        shared = Path(text_encoder_b) == Path(text_encoder_c)
        return cls(
            stage_a=load_stage_a(stage_a, device, dtype),
            stage_b=load_stage_b(stage_b, device, dtype),
            stage_c=load_stage_c(stage_c, device, dtype),
            text_encoder_c=encoder_c,
            text_encoder_b=encoder_c if shared else load_text_encoder(text_encoder_b, device, dtype),
            semantic_compressor=load_semantic_compressor(semantic_compressor, device, dtype),
            previewer=None if previewer is None else load_previewer(previewer, device, dtype),
        )

    @classmethod
    def from_folder(cls, folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> "Wuerstchen":
        """A folder that holds the whole set under the names of `SET`."""
        return cls.from_files(**find_set(folder), device=device, dtype=dtype)

    @classmethod
    def mini(cls, device="cpu", dtype: torch.dtype = torch.float32) -> "Wuerstchen":
        """The model in the repository: emoji at 256x256."""
        return cls.from_folder(MINI, device, dtype)

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        width: int = 256,
        height: int = 256,
        batch_size: int = 1,
        seed: int = 0,
        steps_c: int = 30,
        cfg_c: float = 4.0,
        steps_b: int = 12,
        cfg_b: float = 1.0,
        sampler: str = "ddpm",
        schedule: str = "even",
        image: Tensor | None = None,
        denoise: float = 1.0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Tensor:
        """Prompt, and a picture if there is one -> pictures (batch_size, height, width, 3) in [0, 1].

        Args:
            width, height: pixels, multiples of 8.
            cfg_c, cfg_b: strength of the guidance; 1 is off.
            image: (H, W, 3) or (B, H, W, 3) in [0, 1]; scaled to cover the size asked for, and its middle used.
            denoise: with an image, how much of it Stage C redraws: 0 (a variation: Stage B draws it anew) to 1 (all).
            progress: called as (stage, step, steps) after each step.

        Raises:
            WuerstchenError: a size, a number of steps or another option is out of its range.
        """
        geometry = Geometry(width, height)
        if batch_size < 1:
            raise WuerstchenError(f"batch_size is {batch_size}: at least 1 is needed")
        device = self.stage_c.projection.weight.device

        def report(stage: str) -> Progress | None:
            return progress and (lambda step, steps, clean: progress(stage, step, steps))

        if image is None:
            denoise = 1.0
            latent = torch.zeros(batch_size, self.stage_c.config.latent_channels, *geometry.stage_c, device=device)
        else:
            image = image if image.dim() == 4 else image[None]
            latent = compress(self.semantic_compressor, fit(image.to(device), geometry))
            latent = latent.repeat(-(-batch_size // len(latent)), 1, 1, 1)[:batch_size]
        semantic = sample_stage_c(
            self.stage_c,
            latent,
            *self.text_encoder_c([prompt, negative_prompt]).split(1),
            steps=steps_c,
            cfg=cfg_c,
            sampler=sampler,
            schedule=schedule,
            denoise=denoise,
            seed=seed,
            progress=report("Stage C"),
        )
        latent = sample_stage_b(
            self.stage_b,
            semantic,
            geometry,
            *self.text_encoder_b([prompt, negative_prompt]).split(1),
            steps=steps_b,
            cfg=cfg_b,
            sampler=sampler,
            seed=seed,
            progress=report("Stage B"),
        )
        return decode(self.stage_a, latent, geometry)


def _sample(network, condition, latent, times, cfg, sampler, draw, mask, dtype, progress) -> Tensor:
    run = sampler_named(sampler)
    latent = latent.float()
    if times[0] == 0:
        return latent
    model = prepare(network, condition, times, latent.device, dtype)
    if cfg != 1:
        model = guide(model, cfg)
    noise = draw()
    start = noise if times[0] == 1 else add_noise(latent, noise, times[0])
    if mask is not None:
        model = keep_outside(model, mask, latent, noise)

    def report(step: int, clean: Tensor) -> None:
        if progress is not None:
            progress(step, len(times) - 1, clean)

    sampled = run(model, start, times, draw, report)
    return sampled if mask is None else torch.lerp(latent, sampled, mask)


def noise_source(latent: Tensor, seed: int, batch_index: list[int] | None) -> Callable[[], Tensor]:
    """Standard normal noise in the latent's shape at every call, drawn on the CPU.

    Each call has a generator of its own, the first one the seed's, so that a picture gets the same noise whatever the
    size of its batch.
    """
    if not -(2**63) <= seed < 2**64:
        raise WuerstchenError(f"seed is {seed}: it must have 64 bits at most")
    index = list(range(latent.shape[0])) if batch_index is None else batch_index
    later = random.Random(seed)
    seeds = chain([seed], iter(lambda: later.getrandbits(63), None))

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(next(seeds))
        return torch.randn(max(index) + 1, *latent.shape[1:], generator=generator)[index].to(latent.device)

    return draw


def _texts(text: Tensor, negative: Tensor | None, batch: int, width: int, stage: str) -> Tensor:
    """The text of every picture of the batch, then, with guidance, the negative of every one."""
    for given in (text, negative):
        if given is not None and given.shape[-1] != width:
            raise WuerstchenError(
                f"{stage} was trained with a text encoder of width {width}, but this text comes from one of width "
                f"{given.shape[-1]}: encode it with the text encoder that belongs to {stage}"
            )
        if given is not None and not is_finite(given):
            raise WuerstchenError(f"the text for {stage} is not finite: run its text encoder in float32")
    halves = [text] if negative is None else [text, negative]
    longest = max(half.shape[1] for half in halves)
    return torch.cat([_to_length(half, longest).expand(batch, -1, -1) for half in halves])


def _to_length(text: Tensor, length: int) -> Tensor:
    """The shorter of two texts is repeated, as the encoding of a text in chunks would be."""
    repeats = -(-length // text.shape[1])
    return text.repeat(1, repeats, 1)[:, :length]


def _crop(planes: Tensor, geometry: Geometry) -> Tensor:
    left, _, top, _ = geometry.margins
    return planes[:, :, top : top + geometry.height, left : left + geometry.width]


def _planes(image: Tensor) -> Tensor:
    return rearrange(image, "b h w c -> b c h w").float()


# Where to go on from a precision that was too narrow.
WIDER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}


def _finite(result: Tensor, network: str, dtype: torch.dtype) -> Tensor:
    """The result itself; raises WuerstchenError if a value in it is NaN or infinite."""
    if is_finite(result):
        return result
    precision = str(dtype).removeprefix("torch.")
    hint = f"run it in {WIDER[dtype]}" if dtype in WIDER else "what it was given is not finite, or out of all range"
    raise WuerstchenError(f"{network} gave values that are not finite in {precision}: {hint}")


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
