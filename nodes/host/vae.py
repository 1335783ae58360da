"""Stage A, and the semantic compressor with a previewer, as ComfyUI's VAE."""

import logging
from pathlib import Path

import comfy.model_management as management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor, nn

from ...wuerstchen_core import WuerstchenError, tiling
from ...wuerstchen_core.checkpoints.load import (
    METADATA_KEY,
    header_tensor,
    load_network,
    load_previewer,
    load_semantic_compressor,
)
from ...wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW
from ...wuerstchen_core.geometry import STEP
from ...wuerstchen_core.models.defaults import defaults_of
from ...wuerstchen_core.models.previewer import FACTOR
from ...wuerstchen_core.models.stage_a import VQGAN
from ...wuerstchen_core.pipeline import compress


class WholePatcher(ModelPatcher):
    """Loads all of a network or none of it, with `--novram` as well, under which ComfyUI would load none."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)


class VAE(comfy.sd.VAE):
    """A network with `encode` and `decode`. It is never loaded in part: BatchNorm and gammas cannot cast themselves."""

    NAME: str
    SOURCES: str  # of latents
    CHANNELS: int
    RATIO: int  # pixels to a position of the latent

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        super().__init__(sd={})  # sets whatever this version's methods read, and warns that there is no network
        logging.disable(disabled)
        self.first_stage_model = network.eval()
        self.latent_channels = self.CHANNELS
        self.downscale_ratio = self.upscale_ratio = self.RATIO
        self.process_input = lambda image: image
        self.process_output = lambda image: image.clamp(0, 1)
        self.disable_offload = True
        self.device, self.vae_dtype = management.vae_device(), dtype
        self.output_device = management.intermediate_device()
        self.patcher = WholePatcher(network, self.device, management.vae_offload_device())

    def decode(self, samples_in, *more, **options):
        self._check(samples_in)
        return super().decode(samples_in, *more, **options)

    def decode_tiled(self, samples, *more, **options):
        self._check(samples)
        return super().decode_tiled(samples, *more, **options)

    def encode(self, pixel_samples):
        return super().encode(self._colours(pixel_samples))

    def encode_tiled(self, pixel_samples, *more, **options):
        return super().encode_tiled(self._colours(pixel_samples), *more, **options)

    def _colours(self, pixels: Tensor) -> Tensor:
        if min(pixels.shape[1:3]) < STEP:
            raise WuerstchenError(
                f"{self.NAME}: this image is {pixels.shape[2]}x{pixels.shape[1]} pixels, at least {STEP}x{STEP} are "
                "needed"
            )
        return pixels[..., :3]

    def _check(self, samples: Tensor) -> None:
        if samples.dim() != 4 or samples.shape[1] != self.latent_channels:
            raise WuerstchenError(
                f"{self.NAME} takes a latent of {self.latent_channels} channels, this one is "
                f"{'x'.join(map(str, samples.shape[1:]))}: take it from {self.SOURCES}"
            )


class RawVQGAN(VQGAN):
    """Stage A with latents as they come from it, not divided by its scale factor: ComfyUI's convention.

    Where memory is short it works in tiles, with the same result.
    """

    def encode(self, image: Tensor) -> Tensor:
        return tiling.encode(self, image) * self.config.scale_factor

    def decode(self, latent: Tensor) -> Tensor:
        return tiling.decode(self, latent / self.config.scale_factor)


class StageAVAE(VAE):
    NAME, SOURCES = "Stage A", "a sampler with Stage B, or Würstchen VQGAN Encode"
    CHANNELS, RATIO = 4, 4

    def __init__(self, path: Path):
        dtype = management.vae_dtype(management.vae_device(), [torch.float16, torch.bfloat16])
        network = load_network("stage_a", path, management.vae_offload_device(), dtype, network=RawVQGAN)
        super().__init__(network, dtype)
        self.memory_used_encode = lambda shape, dtype: self._memory(shape[2] * shape[3] // self.RATIO**2, dtype)
        self.memory_used_decode = lambda shape, dtype: self._memory(shape[2] * shape[3], dtype)

    def _memory(self, positions: int, dtype: torch.dtype) -> int:
        """Bytes for a picture: never more than tiles need, so that no other network has to make room for more."""
        picture = positions * 3 * self.RATIO**2 * dtype.itemsize
        whole = positions * tiling.working_memory(self.first_stage_model.config, dtype.itemsize)
        return picture + min(whole, 2 * tiling.TILE_MEMORY)

    def get_sd(self):
        return {**super().get_sd(), METADATA_KEY: header_tensor(self.first_stage_model)}


class SemanticCoder(nn.Module):
    def __init__(self, compressor: nn.Module, previewer: nn.Module):
        super().__init__()
        self.compressor, self.previewer = compressor, previewer

    def encode(self, pixels: Tensor) -> Tensor:
        return compress(self.compressor, rearrange(pixels, "b c h w -> b h w c"))

    def decode(self, latent: Tensor) -> Tensor:
        return self.previewer(latent)


class SemanticVAE(VAE):
    """Encoding compresses a picture for Stages C and B; decoding shows a latent as a small picture."""

    NAME, SOURCES = "The semantic VAE", "a sampler with Stage C, or Würstchen Semantic Compress"
    CHANNELS, RATIO = 16, FACTOR

    def __init__(self, compressor: Path, previewer: Path | None = None):
        offload = management.vae_offload_device()
        loaded = load_semantic_compressor(compressor, offload)
        self.defaults = defaults_of(loaded.config)
        network = SemanticCoder(loaded, load_previewer(previewer or LINEAR_PREVIEW, offload))
        super().__init__(network, torch.float32)
        self.downscale_ratio = STEP  # what pictures are cut to multiples of
        self.memory_used_encode = lambda shape, dtype: 200 * shape[2] * shape[3]
        self.memory_used_decode = lambda shape, dtype: 72 * 1024 * shape[2] * shape[3]

    def encode_tiled(self, pixel_samples, *more, **options):
        """The picture is reduced to three quarters first; a compressor sees little of it in tiles, and fits anyway."""
        return self.encode(pixel_samples)

    def get_sd(self):
        network = self.first_stage_model
        headers = {f"{name}.{METADATA_KEY}": header_tensor(part) for name, part in network.named_children()}
        return {**super().get_sd(), **headers}
