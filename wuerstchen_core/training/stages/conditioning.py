"""Conditions for training: features of pictures and captions, computed by networks that are frozen."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoints.archive import open_archive
from ...checkpoints.load import Network, load_semantic_compressor, load_text_encoder
from ...checkpoints.sets import MINI, SET
from ...diffusion.schedule import add_noise
from ...geometry import WORK_STEP, Geometry
from ...models.latent_space import LatentSpace
from ...models.semantic_compressor import SemanticCompressor, SemanticCompressorConfig
from ...models.text_encoder import TextEncoder
from ...util.errors import WuerstchenError, readable
from ..data.tally import Tally

EMBEDDED = "mini"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_CAPTION = 8192  # characters that are tokenized: a token has 32 bytes at most, and 75 of them are read

log = logging.getLogger(__name__)


def weight_file(option: str, name: str, embedded: str) -> Path:
    """The file that an option names, "mini" being the embedded one. Raises WuerstchenError if there is no such file."""
    if name == EMBEDDED:
        return MINI / embedded
    if not name:
        raise WuerstchenError(f"{option} is missing: name a file of weights, or {EMBEDDED} for the embedded one")
    path = Path(name)
    if not os.path.exists(path):
        raise WuerstchenError(
            f'{option}: there is no {readable(path, 150)}; the README\'s "The released weights" says where to get it, '
            f"and --{option.replace('_', '-')} {EMBEDDED} takes the embedded one"
        )
    return path


def copied(network: Network) -> Network:
    """A trainable copy of a network with its configuration and weights: loaded networks are views of their file."""
    trainable = type(network)(network.config)
    trainable.load_state_dict(network.state_dict())
    return trainable


def check_size(size: int) -> None:
    """Raises WuerstchenError if the latents of pictures with this side would not fit all stages."""
    if size < WORK_STEP or size % WORK_STEP:
        raise WuerstchenError(f"size is {size}: it must be a multiple of {WORK_STEP}")


@contextmanager
def computed_in(precision: str, device: torch.device) -> Iterator[None]:
    """Within the context networks compute in a precision, one of PRECISIONS, whatever the training's own is."""
    is_lower = precision != "float32"
    with torch.autocast(device.type, dtype=PRECISIONS[precision] if is_lower else None, enabled=is_lower):
        yield


def check_precision(precision: str) -> None:
    """Raises WuerstchenError unless the frozen networks' precision is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise WuerstchenError(f"frozen_precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")


class CaptionEncoder:
    """Captions -> a text encoder's states; counts those that are longer than what it reads.

    Only the first 75 tokens of a caption are encoded, up to a whole word. The first caption that is cut is reported in
    a warning, and so are the tenth, the hundredth and so on.
    """

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self.cut = Tally()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, 77, width)"""
        return self.encoder.encode_tokens(self.tokens(captions))

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Captions -> token ids (B, 77)"""
        tokens, is_cut = caption_tokens(self.encoder, captions)
        if self.cut.add(int(is_cut.sum()), len(captions)):
            log.warning(
                "%d of %d captions so far are longer than the %d tokens that the text encoder reads: the rest of each "
                "is cut off",
                self.cut.faulty,
                self.cut.total,
                self.encoder.config.context_length - 2,
            )
        return tokens


def encode_captions(encoder: TextEncoder, captions: Sequence[str]) -> Tensor:
    """Captions -> (B, 77, width). Parentheses are plain characters, and only the first 75 tokens are encoded."""
    return encoder.encode_tokens(caption_tokens(encoder, captions)[0])


def caption_tokens(encoder: TextEncoder, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Captions -> token ids of their first 75 tokens (B, 77), and whether there are more (B,)."""
    texts = [" ".join(caption.split()) for caption in captions]
    escaped = [re.sub(r"([()])", r"\\\1", text[:LONGEST_CAPTION]) for text in texts]
    tokens, _ = encoder.tokenize(escaped)
    goes_on = (tokens[:, 1:, 1] != encoder.tokenizer.eot_token_id).any(dim=1)
    return tokens[:, 0], goes_on | torch.tensor([len(text) > LONGEST_CAPTION for text in texts])


def drop_captions(text: Tensor, nothing: Tensor, share: float, uniform: Tensor) -> Tensor:
    """text (B, L, width) -> the same, with a share of the texts replaced by the empty text's states (1, L, width).

    uniform (B,), in [0, 1), decides which.
    """
    return torch.where((uniform < share)[:, None, None], nothing.to(text), text)


def compressor_input(image: Tensor) -> Tensor:
    """image (B, 3, H, W), sides multiples of 64 -> the picture at the size that the semantic compressor reads"""
    geometry = Geometry(width=image.shape[3], height=image.shape[2])
    return F.interpolate(image, size=geometry.compressor, mode="bicubic", antialias=True).clamp(0, 1)


def semantic(compressor: SemanticCompressor, image: Tensor) -> Tensor:
    """image (B, 3, H, W), sides multiples of 64 -> its latent in Stage C's space (B, 16, p, q)"""
    return compressor.config.latent_space.from_features(compressor(compressor_input(image)))


def spoil(
    features: Tensor, space: LatentSpace, zeroed: float, noised: float, chance: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Raw features (B, 16, p, q) -> the same, a share `zeroed` of them zero and a share `noised` with noise.

    This is the paper's augmentation for Stage B. chance (B,), uniform in [0, 1), decides which; noise (B, 16, p, q) is
    added at times t (B,) in Stage C's space, where the features' variance is one.
    """
    noisy = space.to_features(add_noise(space.from_features(features), noise, t))
    chance = chance[:, None, None, None]
    spoiled = torch.where(chance < zeroed + noised, noisy, features)
    return torch.where(chance < zeroed, torch.zeros_like(features), spoiled)


def load_backbone(compressor: SemanticCompressor, path: str | Path) -> None:
    """Loads torchvision's EfficientNetV2 weights (ImageNet) into the compressor's backbone.

    Raises:
        WuerstchenError: the file can't be read, or belongs to a network of another size.
    """
    try:
        archive = open_archive(path)
        names = [name for name in archive.tensors if name.startswith("features.")]
        backbone = {name.removeprefix("features."): archive.read(name) for name in names}
        compressor.backbone.load_state_dict(backbone)
    except Exception as error:  # a damaged file raises nearly anything
        raise WuerstchenError(
            f"backbone: {path} is not torchvision's state dict of the EfficientNetV2 that [compressor] describes "
            f"({readable(error, 200)})"
        ) from error


def compressor_for(
    name: str, config: SemanticCompressorConfig, backbone: str, trained: bool
) -> tuple[SemanticCompressor, list[Path]]:
    """The semantic compressor that options name, trainable if it is to be `trained`, and the file it stays as if not.

    Without a name it is a new one, which starts from torchvision's weights if `backbone` names them.
    """
    if not name:
        compressor = SemanticCompressor(config)
        if backbone:
            load_backbone(compressor, backbone)
        return compressor, []
    path = weight_file("semantic_compressor", name, SET["semantic_compressor"])
    compressor = load_semantic_compressor(path)
    return (copied(compressor), []) if trained else (compressor, [path])


def text_encoder_for(option: str, name: str, width: int, network: str) -> tuple[Path, TextEncoder]:
    """The text encoder for a network that reads states of this width, and its file.

    Raises WuerstchenError if there is no such file or its width is another one.
    """
    path = weight_file(option, name, SET["text_encoder_c"])
    encoder = load_text_encoder(path)
    if encoder.config.width != width:
        raise WuerstchenError(
            f"{option}: {path} gives texts of width {encoder.config.width}, but {network} reads {width}: set "
            f"network.text_width, or choose the text encoder that belongs to it"
        )
    return path, encoder
