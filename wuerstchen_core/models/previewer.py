"""The previewer: Stage C's latent -> a small picture (paper, appendix D), to see what Stage C draws without Stage B."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import LayerNorm2d
from .config import check_config, require

FACTOR = 8  # pixels of the small picture to a position of the latent


@dataclass(frozen=True)
class PreviewerConfig:
    """The defaults have the paper's 3.9 M parameters. Without widths the previewer is linear: a colour a position."""

    latent_channels: int = 16
    widths: tuple[int, ...] = (512, 256, 128, 96)  # at 1, 2, 4 and 8 times the latent's size


class ConvBlock(nn.Module):
    """A 3x3 convolution of what is normalised, added to what comes in."""

    def __init__(self, channels: int, operations=nn):
        super().__init__()
        self.norm = LayerNorm2d()
        self.conv = operations.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.conv(self.norm(x)))


class Previewer(nn.Module):
    """Latent in Stage C's space -> picture of 8 times its size.

    Raises:
        WuerstchenError: the configuration has neither no widths nor four, which are three doublings, or a size that is
            not possible.
    """

    def __init__(self, config: PreviewerConfig = PreviewerConfig(), operations=nn):
        super().__init__()
        check_config(config)
        self.config = config
        widths = config.widths
        if not widths:
            self.layers = nn.Sequential(
                operations.Conv2d(config.latent_channels, 3, 1), nn.Upsample(scale_factor=FACTOR, mode="nearest")
            )
            return
        require(len(widths) == 4, f"widths are {list(widths[:8])}: a previewer has four, or none if it is linear")
        layers = [operations.Conv2d(config.latent_channels, widths[0], 1), ConvBlock(widths[0], operations)]
        for wide, narrow in pairwise(widths):
            layers += [operations.ConvTranspose2d(wide, narrow, 2, stride=2), ConvBlock(narrow, operations)]
        layers += [LayerNorm2d(), operations.Conv2d(widths[-1], 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        """latent (B, 16, p, q) in Stage C's space -> picture (B, 3, 8p, 8q), about [0, 1] but not clamped"""
        return self.layers(latent.contiguous(memory_format=torch.channels_last))
