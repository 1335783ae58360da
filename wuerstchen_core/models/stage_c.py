"""Stage C: latent diffusion in the semantic compressor's space, conditioned on text (paper section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import AttnBlock, LayerNorm2d, ResBlock, TimestepBlock, check_heads, check_time, timestep_embedding
from .config import check_config


@dataclass(frozen=True)
class StageCConfig:
    """The defaults are the released v2."""

    latent_channels: int = 16
    width: int = 1536
    depth: int = 32
    heads: int = 24
    text_width: int = 1280
    time_width: int = 64
    dropout: float = 0.1  # in training mode only


class Prior(nn.Module):
    """Predicts the noise in a latent of Stage C.

    `prior(x, t, text)` does it all; a sampler calls `condition` and `modulate` once a run and `denoise` every step.

    Raises:
        WuerstchenError: there is no such network, since a size of the configuration is not possible.
    """

    def __init__(self, config: StageCConfig = StageCConfig(), operations=nn):
        super().__init__()
        check_config(config)
        check_heads(config.width, config.heads)
        check_time(config.time_width, config.dropout)
        self.config = config
        width = config.width
        self.projection = operations.Conv2d(config.latent_channels, width, 1)
        self.cond_mapper = nn.Sequential(
            operations.Linear(config.text_width, width), nn.LeakyReLU(0.2), operations.Linear(width, width)
        )
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.blocks.append(ResBlock(width, dropout=config.dropout, operations=operations))
            self.blocks.append(TimestepBlock(width, config.time_width, operations))
            self.blocks.append(AttnBlock(width, width, config.heads, config.dropout, operations))
        self.out = nn.Sequential(LayerNorm2d(), operations.Conv2d(width, config.latent_channels * 2, 1))

    def condition(self, text: Tensor) -> list:
        """text (B, L, text_width) -> the keys and values of every attention block."""
        text = self.cond_mapper(text)
        return [block.condition(text) for block in self.blocks if isinstance(block, AttnBlock)]

    def modulate(self, t: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """t (N,) in [0, 1] -> scale and shift (N, 2 * width, 1, 1) of every timestep block, in `dtype`."""
        embedding = timestep_embedding(t, self.config.time_width).to(dtype)
        return [block.modulate(embedding) for block in self.blocks if isinstance(block, TimestepBlock)]

    def denoise(self, x: Tensor, modulation: list[Tensor], condition: list) -> Tensor:
        """x (B, 16, p, q) -> the noise in it, the same shape.

        The network computes in the modulation's precision, the noise is taken from x in x's own: where x is nearly all
        noise, an error of its rounding would be as large as the picture.
        """
        h = self.projection(x.to(modulation[0].dtype).contiguous(memory_format=torch.channels_last))
        groups = zip(self.blocks[0::3], self.blocks[1::3], self.blocks[2::3], modulation, condition, strict=True)
        for res, time, attn, scale_shift, context in groups:
            h = attn(time(res(h), scale_shift), context)
        a, b = self.out(h).to(x.dtype).chunk(2, dim=1)
        return (x - a) / ((1 - b).abs() + 1e-5)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x (B, 16, p, q), t (B,) in [0, 1], text (B, L, text_width) -> the noise in x, the same shape."""
        return self.denoise(x, self.modulate(t, x.dtype), self.condition(text))
