"""The semantic compressor: EfficientNetV2 features, projected to 16 channels (paper section 3)."""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

from ..util.errors import WuerstchenError
from .config import check_config, require
from .latent_space import LatentSpace

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BackboneStage(NamedTuple):
    """A row of EfficientNetV2's architecture table (arXiv 2104.00298, table 4)."""

    fused: bool
    expansion: int
    stride: int
    channels: int
    layers: int


EFFICIENTNET_V2_S = (
    BackboneStage(True, 1, 1, 24, 2),
    BackboneStage(True, 4, 2, 48, 4),
    BackboneStage(True, 4, 2, 64, 4),
    BackboneStage(False, 4, 2, 128, 6),
    BackboneStage(False, 6, 1, 160, 9),
    BackboneStage(False, 6, 2, 256, 15),
)


@dataclass(frozen=True)
class SemanticCompressorConfig:
    """The defaults are the released v2."""

    stem: int = 24
    stages: tuple[BackboneStage, ...] = EFFICIENTNET_V2_S
    features: int = 1280
    latent_channels: int = 16
    latent_space: LatentSpace = field(default_factory=LatentSpace)


class SemanticCompressor(nn.Module):
    """Picture -> the raw features that Stage B is conditioned on.

    Raises:
        WuerstchenError: there is no such network, since a size of the configuration is not possible.
    """

    def __init__(self, config: SemanticCompressorConfig = SemanticCompressorConfig()):
        super().__init__()
        check_config(config)
        require(len(config.stages) > 0, "stages are empty: the semantic compressor needs at least one")
        for stage in config.stages:
            require(stage.expansion <= 64, f"expansion is {stage.expansion}: it must be from 1 to 64")
            require(stage.stride <= 2, f"stride is {stage.stride}: it must be 1 or 2")
        config.latent_space.check()
        self.config = config
        self.backbone = _backbone(config)
        self.mapper = nn.Sequential(
            nn.Conv2d(config.features, config.latent_channels, 1, bias=False),
            nn.BatchNorm2d(config.latent_channels),
        )

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [0, 1], sides multiples of 32 -> raw features (B, 16, H / 32, W / 32).

        Raises:
            WuerstchenError: a side is not a multiple of 32.
        """
        if image.shape[-2] % 32 or image.shape[-1] % 32:
            raise WuerstchenError(f"the compressor takes sides that are multiples of 32, not {tuple(image.shape[-2:])}")
        mean, std = (image.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        image = ((image - mean) / std).to(next(self.mapper.parameters()).dtype)
        return self.mapper(self.backbone(image.contiguous(memory_format=torch.channels_last)))


def _backbone(config: SemanticCompressorConfig) -> nn.Module:
    settings, channels = [], config.stem
    for stage in config.stages:
        block = FusedMBConvConfig if stage.fused else MBConvConfig
        settings.append(block(stage.expansion, 3, stage.stride, channels, stage.channels, stage.layers))
        channels = stage.channels
    network = EfficientNet(
        settings,
        dropout=0.0,
        stochastic_depth_prob=0.0,
        num_classes=1,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        last_channel=config.features,
    )
    return network.features
