"""Stage A: a VQGAN of factor 4, picture <-> latent (paper section 3; Paella's VQGAN)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import gelu, to_planes, to_rows
from .config import check_config, require

DISTANCES = 1 << 24  # between latents and codebook
MLP_NUMBERS = 1 << 21  # that a block's MLP widens to at a time on a CPU


@dataclass(frozen=True)
class StageAConfig:
    """The defaults are the released VQGAN."""

    widths: tuple[int, ...] = (192, 384)
    bottleneck_blocks: int = 12
    latent_channels: int = 4
    codebook_size: int = 8192
    scale_factor: float = 0.3764


class MixingBlock(nn.Module):
    """Depthwise convolution and channel-wise MLP, each behind a gated LayerNorm."""

    def __init__(self, channels: int, operations=nn):
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), operations.Conv2d(channels, channels, 3, groups=channels)
        )
        self.channelwise = nn.Sequential(
            operations.Linear(channels, channels * 4), nn.GELU(), operations.Linear(channels * 4, channels)
        )
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.gammas.to(x)
        x = to_rows(x)
        mixed = self.depthwise(to_planes(_norm(x, scale_1, shift_1)))
        x = torch.addcmul(x, to_rows(mixed), gate_1)
        widen, activation, narrow = self.channelwise

        def mlp(rows: Tensor, out: Tensor | None = None) -> Tensor:
            return torch.addcmul(rows, narrow(gelu(activation, widen(_norm(rows, scale_2, shift_2)))), gate_2, out=out)

        if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
            return to_planes(mlp(x))
        for part in x.flatten(0, 2).split(max(1, MLP_NUMBERS // (4 * x.shape[-1]))):  # what is four times as wide
            mlp(part, out=part)  # stays in the processor's cache
        return to_planes(x)


def _norm(rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm over the channels of (..., C), then * (1 + scale) + shift"""
    channels = rows.shape[-1]
    return F.layer_norm(rows, (channels,), (1 + scale).expand(channels), shift.expand(channels), eps=1e-6)


class Codebook(nn.Module):
    """The vectors that a latent is quantized to."""

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.codebook = nn.Embedding(size, channels)

    def nearest(self, latent: Tensor) -> Tensor:
        """(B, C, H, W) -> indices (B, H, W) of the closest vectors.

        At most DISTANCES distances are in memory at a time.
        """
        points, codebook = to_rows(latent), self.codebook.weight
        parts = points.flatten(0, 2).split(max(1, DISTANCES // len(codebook)))
        return torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in parts]).view(points.shape[:3])

    def forward(self, indices: Tensor) -> Tensor:
        """indices (B, H, W) -> vectors (B, C, H, W)"""
        return to_planes(self.codebook(indices))


class VQGAN(nn.Module):
    """Stage A. Its latents are divided by the scale factor: the space that Stage B denoises.

    Raises:
        WuerstchenError: there is no such network, since a size of the configuration is not possible.
    """

    def __init__(self, config: StageAConfig = StageAConfig(), operations=nn):
        super().__init__()
        check_config(config, bottleneck_blocks=0)
        require(len(config.widths) > 0, "widths are empty: Stage A needs one per level")
        require(config.scale_factor > 0, f"scale_factor is {config.scale_factor}: it must be above 0")
        self.config = config
        widths, channels = config.widths, config.latent_channels

        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), operations.Conv2d(3 * 4, widths[0], 1))
        down: list[nn.Module] = [MixingBlock(widths[0], operations)]
        for narrow, wide in pairwise(widths):
            down += [operations.Conv2d(narrow, wide, 4, stride=2, padding=1), MixingBlock(wide, operations)]
        down.append(nn.Sequential(operations.Conv2d(widths[-1], channels, 1, bias=False), nn.BatchNorm2d(channels)))
        self.down_blocks = nn.Sequential(*down)

        self.vquantizer = Codebook(config.codebook_size, channels)

        up: list[nn.Module] = [nn.Sequential(operations.Conv2d(channels, widths[-1], 1))]
        up += [MixingBlock(widths[-1], operations) for _ in range(config.bottleneck_blocks)]
        for wide, narrow in pairwise(reversed(widths)):
            up += [operations.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1), MixingBlock(narrow, operations)]
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(operations.Conv2d(widths[0], 3 * 4, 1), nn.PixelShuffle(2))

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [0, 1], sides multiples of 4 -> latent (B, 4, H / 4, W / 4), not quantized"""
        image = image.contiguous(memory_format=torch.channels_last)
        return self.down_blocks(self.in_block(image)) / self.config.scale_factor

    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, 4, h, w) -> image (B, 3, 4h, 4w), about [0, 1] but not clamped; not quantized"""
        latent = latent.contiguous(memory_format=torch.channels_last)
        return self.out_block(self.up_blocks(latent * self.config.scale_factor))

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent (B, 4, h, w) -> the nearest codebook vectors, in the same space, and their indices (B, h, w)"""
        indices = self.vquantizer.nearest(latent * self.config.scale_factor)
        return self.vquantizer(indices) / self.config.scale_factor, indices

    @torch.no_grad()
    def revive(self, latent: Tensor, indices: Tensor) -> None:
        """Training: codebook vectors that are none of `indices` take the place of random points of the latent."""
        codebook = self.vquantizer.codebook.weight
        dead = torch.ones(len(codebook), dtype=torch.bool, device=codebook.device)
        dead[indices.unique()] = False
        points = to_rows(latent * self.config.scale_factor).flatten(0, 2)
        codebook[dead] = points[torch.randint(len(points), (int(dead.sum()),), device=points.device)]
