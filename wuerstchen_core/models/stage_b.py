"""Stage B: latent diffusion in Stage A's space, conditioned on the semantic latent and on text (paper section 3)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import (
    AttnBlock,
    LayerNorm2d,
    ResBlock,
    TimestepBlock,
    check_heads,
    check_time,
    timestep_embedding,
    to_rows,
)
from .config import check_config, require
from .latent_space import LatentSpace


@dataclass(frozen=True)
class StageBConfig:
    """The defaults are the released v2.

    `text_absent`: it was trained with no text at all in a share of the steps, and gets none where there is none. Other
    networks get zero states in its place, which hardly change the picture (paper, camera-ready appendix J).
    """

    latent_channels: int = 4
    patch: int = 2
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (0, 10, 20, 20)  # 0: the level has no attention
    blocks: tuple[int, ...] = (4, 4, 14, 4)
    semantic: tuple[bool, ...] = (False, True, True, True)  # which levels get the semantic latent
    semantic_channels: int = 16
    condition_width: int = 1024
    text_width: int = 1024
    time_width: int = 64
    dropout: float = 0.1  # in training mode only
    latent_space: LatentSpace = field(default_factory=LatentSpace)  # of the Stage C it works with
    stage_a_scale: float = 0.3764  # scale_factor of the Stage A whose latents it denoises
    text_absent: bool = False


CONTEXT_LENGTH = 77  # of the zero states in the place of a text


class StageBCondition(NamedTuple):
    """What Stage B takes from the semantic latent and the text, in the order of its blocks."""

    shares: list  # of every ResBlock: (level's latent (B, h, w, K), matrix (4C, K)), or None
    contexts: list  # of every AttnBlock: keys and values, or None
    windows: list  # of every AttnBlock: the side of the square that a position sees, or None


class DiffNeXt(nn.Module):
    """Predicts the noise in a latent of Stage A: a U-Net of ConvNeXt blocks with attention on its lower levels.

    `diffnext(x, t, semantic, text)` does it all; a sampler calls `condition` and `modulate` once a run and `denoise`
    every step.

    Raises:
        WuerstchenError: there is no such network, since a size of the configuration is not possible.
    """

    def __init__(self, config: StageBConfig = StageBConfig(), operations=nn):
        super().__init__()
        _check(config)
        self.config = config
        widths = config.widths
        levels = range(len(widths))
        deepest = levels[-1]
        patch_channels = config.latent_channels * config.patch**2

        def level_blocks(level: int, skip: int = 0) -> Iterator[nn.Module]:
            width, heads = widths[level], config.heads[level]
            semantic = config.condition_width if config.semantic[level] else 0
            for i in range(config.blocks[level]):
                yield ResBlock(width, skip if i == 0 else 0, semantic, config.dropout, operations)
                yield TimestepBlock(width, config.time_width, operations)
                if heads:
                    yield AttnBlock(width, config.condition_width, heads, config.dropout, operations)

        self.clip_mapper = operations.Linear(config.text_width, config.condition_width)
        self.effnet_mappers = nn.ModuleList(  # None, which its types do not know, keeps the others' numbers
            operations.Conv2d(config.semantic_channels, config.condition_width, 1) if config.semantic[level] else None  # type: ignore[misc]
            for level in (*levels, *reversed(levels))
        )
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(config.patch), operations.Conv2d(patch_channels, widths[0], 1), LayerNorm2d()
        )
        self.down_blocks = nn.ModuleList()
        for level in levels:
            blocks = nn.ModuleList(level_blocks(level))
            if level > 0:
                shrink = operations.Conv2d(widths[level - 1], widths[level], 2, stride=2)
                blocks.insert(0, nn.Sequential(LayerNorm2d(), shrink))
            self.down_blocks.append(blocks)
        self.up_blocks = nn.ModuleList()
        for level in reversed(levels):
            blocks = nn.ModuleList(level_blocks(level, skip=widths[level] if level < deepest else 0))
            if level > 0:
                grow = operations.ConvTranspose2d(widths[level], widths[level - 1], 2, stride=2)
                blocks.append(nn.Sequential(LayerNorm2d(), grow))
            self.up_blocks.append(blocks)
        self.clf = nn.Sequential(
            LayerNorm2d(), operations.Conv2d(widths[0], 2 * patch_channels, 1), nn.PixelShuffle(config.patch)
        )

    def condition(
        self, semantic: Tensor, text: Tensor | None, size: Sequence[int], window: int | None = None
    ) -> StageBCondition:
        """semantic (B, 16, p, q) raw features, text (B, L, text_width) or None, size (rows, columns) of x.

        With a window, attention sees no farther than a square of this side, in positions of x, on all levels but the
        deepest.
        """
        if text is None and not self.config.text_absent:
            text = semantic.new_zeros(1, CONTEXT_LENGTH, self.config.text_width)
        if text is not None:
            text = F.layer_norm(self.clip_mapper(text), (self.config.condition_width,), eps=1e-6)
        shares, contexts, windows = [], [], []
        depth = len(self.config.widths)
        for i, blocks in enumerate((*self.down_blocks, *self.up_blocks)):
            level = min(i, 2 * depth - 1 - i)
            mapper = self.effnet_mappers[i]
            if mapper is not None:
                level_size = [side // (self.config.patch << level) for side in size]
                resized = _with_one(to_rows(_resize(semantic, level_size)))
            for block in blocks:
                if isinstance(block, ResBlock):
                    semantic_part = block.semantic
                    shares.append(semantic_part and (resized, _affine(mapper, semantic_part, semantic)))
                elif isinstance(block, AttnBlock):
                    contexts.append(None if text is None else block.condition(text))
                    near = window and level < depth - 1 and max(2, window // (self.config.patch << level))
                    windows.append(near or None)
        return StageBCondition(shares, contexts, windows)

    def modulate(self, t: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """t (N,) in [0, 1] -> scale and shift (N, 2C, 1, 1) of every timestep block, in `dtype`."""
        embedding = timestep_embedding(t, self.config.time_width).to(dtype)
        return [block.modulate(embedding) for block in self.modules() if isinstance(block, TimestepBlock)]

    def denoise(self, x: Tensor, modulation: list[Tensor], condition: StageBCondition) -> Tensor:
        """x (B, 4, h, w), sides multiples of 16 -> the noise in it, the same shape; in two precisions as in Stage C."""
        modulations, shares = iter(modulation), iter(condition.shares)
        attention = zip(condition.contexts, condition.windows, strict=True)

        def run(blocks: nn.Module, h: Tensor, skip: Tensor | None = None) -> Tensor:
            for block in blocks.children():
                if isinstance(block, ResBlock):
                    h = block(h, skip, next(shares))
                    skip = None
                elif isinstance(block, TimestepBlock):
                    h = block(h, next(modulations))
                elif isinstance(block, AttnBlock):
                    h = block(h, *next(attention))
                else:
                    h = block(h)
            return h

        h = self.embedding(x.to(modulation[0].dtype).contiguous(memory_format=torch.channels_last))
        way_down = []
        for blocks in self.down_blocks:
            h = run(blocks, h)
            way_down.append(h)
        h = run(self.up_blocks[0], way_down.pop())
        for blocks in self.up_blocks[1:]:
            h = run(blocks, h, skip=way_down.pop())
        a, b = self.clf(h).to(x.dtype).chunk(2, dim=1)
        return (x - a) / (b.sigmoid() * (1 - 2e-3) + 1e-3)

    def forward(self, x: Tensor, t: Tensor, semantic: Tensor, text: Tensor | None = None) -> Tensor:
        """x (B, 4, h, w), t (B,) in [0, 1], semantic (B, 16, p, q) raw features, text (B, L, text_width) or None
        -> the noise in x, the same shape."""
        return self.denoise(x, self.modulate(t, x.dtype), self.condition(semantic, text, x.shape[-2:]))


def _check(config: StageBConfig) -> None:
    check_config(config, heads=0)
    levels = len(config.widths)
    for name in ("heads", "blocks", "semantic"):
        count = len(getattr(config, name))
        require(
            count == levels > 0, f"{name} has {count} values: it needs one per level, as widths, which has {levels}"
        )
    for width, heads in zip(config.widths, config.heads, strict=True):
        check_heads(width, heads or 1)
    check_time(config.time_width, config.dropout)
    require(config.stage_a_scale > 0, f"stage_a_scale is {config.stage_a_scale}: it must be above 0")
    config.latent_space.check()


def _resize(semantic: Tensor, size: list[int]) -> Tensor:
    resized = F.interpolate(semantic.float(), size=size, mode="bicubic", antialias=True, align_corners=True)
    return resized.to(semantic.dtype)


def _with_one(rows: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, h, w, K): a channel of ones behind the others."""
    return _padded(F.pad(rows, (0, 1), value=1.0))


def _padded(rows: Tensor) -> Tensor:
    """Zeros behind the last dimension, up to the multiple of 8 that matrix units need."""
    return F.pad(rows, (0, -rows.shape[-1] % 8))


def _affine(mapper: nn.Module, linear: nn.Module, like: Tensor) -> Tensor:
    """The 1x1 convolution and the Linear behind it as one matrix (4C, K), for latents `_with_one`.

    It is read off their outputs for zero and for the unit vectors, so that it holds for whatever a host puts in a
    layer's place (casting, offloading, patched weights).
    """
    channels = like.shape[1]
    probe = torch.cat([torch.zeros(1, channels), torch.eye(channels)]).to(like)
    image = linear(to_rows(mapper(probe[:, :, None, None])))[:, 0, 0]
    return _padded(torch.cat([image[1:] - image[0], image[:1]]).T)
