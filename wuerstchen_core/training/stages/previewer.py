"""The training of a previewer (paper, appendix D): from a picture's semantic latent to the picture, small.

The semantic compressor can be trained with it, which is the cheapest way to a new one: the two are an autoencoder.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...checkpoints.load import load_previewer
from ...checkpoints.sets import SET
from ...geometry import Geometry
from ...models.latent_space import LatentSpace
from ...models.previewer import FACTOR, Previewer, PreviewerConfig
from ...models.semantic_compressor import SemanticCompressor, SemanticCompressorConfig
from ...pipeline import preview
from ...util.errors import WuerstchenError
from ..data.options import DataOptions
from ..loop.draws import Draws
from ..loop.task import Task
from ..options import check_at_least, option
from .conditioning import check_precision, check_size, compressor_for, computed_in, copied, semantic, weight_file


@dataclass(frozen=True)
class Options:
    semantic_compressor: str = option(
        "mini", "the semantic compressor's file; mini: the embedded one; empty: a new one, of [compressor]'s sizes"
    )
    train_compressor: bool = option(False, "train the semantic compressor too; otherwise it is frozen")
    latent_noise: float = option(
        0.0, "while it is trained: standard deviation of the noise added to latents, which Stage C gives with errors"
    )
    backbone: str = option("", "for a new compressor: torchvision's EfficientNetV2 ImageNet weights to start from")
    frozen_precision: str = option(
        "float32", "precision in which the frozen networks compute features: float32, bfloat16 or float16"
    )
    init: str = option("", "a previewer to start from; [network] is then taken from it")
    sample_count: int = option(4, "how many of the data's pictures the samples show, each beside its preview")
    network: PreviewerConfig = option(PreviewerConfig(), "the network's sizes, if init is empty")
    compressor: SemanticCompressorConfig = option(
        SemanticCompressorConfig(latent_space=LatentSpace(0.0, 1.0)),
        "a new compressor's sizes; stages are [fused, expansion, stride, channels, layers]",
    )

    def __post_init__(self):
        check_at_least(0, self, "sample_count", "latent_noise")
        check_precision(self.frozen_precision)
        if not self.semantic_compressor and not self.train_compressor:
            raise WuerstchenError("semantic_compressor: name a file, or train a new one with --train-compressor true")
        if self.latent_noise and not self.train_compressor:
            raise WuerstchenError("latent_noise is for a compressor that is trained: --train-compressor true")


def build(options: Options, data: DataOptions) -> "PreviewerTask":
    """Raises WuerstchenError if a file is missing or the previewer does not fit the compressor's latents."""
    check_size(data.size)
    if data.cache and options.train_compressor:
        raise WuerstchenError("cache: the pictures are needed themselves while the compressor is trained")
    compressor, compressor_files = compressor_for(
        options.semantic_compressor, options.compressor, options.backbone, options.train_compressor
    )
    if options.init:
        network = copied(load_previewer(weight_file("init", options.init, SET["previewer"])))
    else:
        network = Previewer(options.network)
        *_, last = (layer for layer in network.layers if isinstance(layer, nn.Conv2d))
        assert last.bias is not None
        nn.init.constant_(last.bias, 0.5)  # grey
    channels = compressor.config.latent_channels, network.config.latent_channels
    if len(set(channels)) > 1:
        raise WuerstchenError(
            f"semantic_compressor: its latents have {channels[0]} channels, and the previewer is for {channels[1]}"
        )
    task = PreviewerTask(network, compressor, options, data)
    task.feature_files = tuple(compressor_files)
    return task


class PreviewerTask(Task):
    """`network` learns to draw small pictures from the compressor's latents of large ones.

    The compressor is frozen or learns with it (`options.train_compressor`).
    """

    frozen: tuple[SemanticCompressor, ...]

    def __init__(self, network: Previewer, compressor: SemanticCompressor, options: Options, data: DataOptions):
        super().__init__()
        self.network = network
        self.options, self.data = options, data
        self.compressor = compressor if options.train_compressor else None
        self.frozen = () if options.train_compressor else (compressor,)
        self.features_of_captions = False
        self.feature_key = options.frozen_precision
        self.pictures: tuple[Tensor, ...] = ()

    def features(self, batch: dict) -> dict[str, Tensor]:
        image = batch["image"]
        with computed_in(self.options.frozen_precision, image.device):
            found = {"small": small(image)}
            if self.compressor is None:
                found["semantic"] = semantic(self.frozen[0], image)
        return found

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        found = batch["features"]
        if self.compressor is None:
            latent = found["semantic"]
        else:
            latent = semantic(self.compressor, batch["image"])
            latent = latent + self.options.latent_noise * draws.normal(latent.shape[1:])
        return {"picture": F.mse_loss(self.network(latent).float(), found["small"])}

    def exported(self) -> dict[str, nn.Module]:
        if self.compressor is None:
            return {"previewer": self.network}
        return {"previewer": self.network, "semantic_compressor": self.compressor}

    def samples(self) -> Tensor | None:
        if not self.options.sample_count:
            return None
        if not self.pictures:
            self.pictures = (self.data.first_pictures(self.options.sample_count),)
        image = self.pictures[0].to(next(self.network.parameters()).device)
        compressor = self.frozen[0] if self.compressor is None else self.compressor
        drawn = preview(self.network, semantic(compressor, image))
        return torch.stack([rearrange(small(image), "b c h w -> b h w c"), drawn], dim=1).flatten(0, 1)


def small(image: Tensor) -> Tensor:
    """image (B, 3, H, W), sides multiples of 64 -> the picture that a previewer should draw of it (B, 3, 8p, 8q)"""
    geometry = Geometry(width=image.shape[3], height=image.shape[2])
    size = [FACTOR * side for side in geometry.stage_c]
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)
