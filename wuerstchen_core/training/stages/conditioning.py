"""What the tasks make of pictures and captions with networks that are trained already."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.archive import open_archive
from ...checkpoints.load import load_text_encoder
from ...checkpoints.sets import MINI, SET
from ...diffusion.schedule import add_noise
from ...geometry import WORK_STEP, Geometry
from ...models.latent_space import LatentSpace
from ...models.semantic_compressor import SemanticCompressor
from ...models.text_encoder import TextEncoder
from ...util.errors import WuerstchenError

EMBEDDED = "mini"


def weight_file(option: str, name: str, embedded: str) -> Path:
    """The file that an option names: "mini" is the embedded one. Raises WuerstchenError where there is none."""
    if name == EMBEDDED:
        return MINI / embedded
    if not name:
        raise WuerstchenError(f"{option} is missing: name a file of weights, or {EMBEDDED} for the embedded one")
    path = Path(name)
    if not path.exists():
        raise WuerstchenError(
            f'{option}: there is no {name}; the README\'s "The released weights" says where to get it, and '
            f"--{option.replace('_', '-')} {EMBEDDED} takes the embedded one"
        )
    return path


def copied(network: nn.Module) -> nn.Module:
    """A network of the same configuration and weights that can be trained: loaded ones are views of their file."""
    trainable = type(network)(network.config)
    trainable.load_state_dict(network.state_dict())
    return trainable


def check_size(size: int) -> None:
    """Raises WuerstchenError where latents of pictures of this side would not fit all stages."""
    if size < WORK_STEP or size % WORK_STEP:
        raise WuerstchenError(f"size is {size}: it must be a multiple of {WORK_STEP}")


def encode_captions(encoder: TextEncoder, captions: Sequence[str]) -> Tensor:
    """Captions -> (B, 77, width). Parentheses are read as such, and what goes beyond the first 77 tokens is cut off."""
    states = encoder([re.sub(r"([()])", r"\\\1", caption) for caption in captions])
    return states[:, : encoder.config.context_length]


def drop_captions(text: Tensor, nothing: Tensor, share: float, uniform: Tensor) -> Tensor:
    """text (B, L, width) -> the same, with that share of the texts replaced by the empty one's states (1, L, width)."""
    return torch.where((uniform < share)[:, None, None], nothing.to(text), text)


def compressor_input(image: Tensor) -> Tensor:
    """image (B, 3, H, W), sides multiples of 64 -> the picture that the semantic compressor sees of it"""
    geometry = Geometry(width=image.shape[3], height=image.shape[2])
    return F.interpolate(image, size=geometry.compressor, mode="bicubic", antialias=True).clamp(0, 1)


def semantic(compressor: SemanticCompressor, image: Tensor) -> Tensor:
    """image (B, 3, H, W), sides multiples of 64 -> its latent in Stage C's space (B, 16, p, q)"""
    return compressor.config.latent_space.from_features(compressor(compressor_input(image)))


def spoil(
    features: Tensor, space: LatentSpace, zeroed: float, noised: float, chance: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Raw features (B, 16, p, q), of which a share becomes zero and a share gets noise of times t (B,), as far as
    chance (B,), uniform in [0, 1), has it (paper, Stage B's training); in Stage C's space, where their variance is one.
    """
    noisy = space.to_features(add_noise(space.from_features(features), noise, t))
    chance = chance[:, None, None, None]
    spoiled = torch.where(chance < zeroed + noised, noisy, features)
    return torch.where(chance < zeroed, torch.zeros_like(features), spoiled)


def load_backbone(compressor: SemanticCompressor, path: str | Path) -> None:
    """torchvision's EfficientNetV2 weights (ImageNet) into the compressor's backbone.

    Raises:
        WuerstchenError: the file can't be read, or is of another size.
    """
    try:
        archive = open_archive(path)
        names = [name for name in archive.tensors if name.startswith("features.")]
        backbone = {name.removeprefix("features."): archive.read(name) for name in names}
        compressor.backbone.load_state_dict(backbone)
    except Exception as error:  # a damaged file raises nearly anything
        raise WuerstchenError(
            f"backbone: {path} is not torchvision's state dict of the EfficientNetV2 that [compressor] describes "
            f"({str(error).splitlines()[0]})"
        ) from error


def text_encoder_for(option: str, name: str, width: int, network: str) -> tuple[Path, TextEncoder]:
    """The text encoder for a network that reads texts of this width. Raises WuerstchenError where it has another."""
    path = weight_file(option, name, SET["text_encoder_c"])
    encoder = load_text_encoder(path)
    if encoder.config.width != width:
        raise WuerstchenError(
            f"{option}: {path} gives texts of width {encoder.config.width}, but {network} reads {width}: set "
            f"network.text_width, or take the text encoder that belongs to it"
        )
    return path, encoder
