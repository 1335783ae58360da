"""The blocks that Stage B and Stage C are made of (arXiv 2306.00637, appendix; names as in the published weights).

Pictures of features are (B, C, H, W) everywhere, kept channels-last in memory so that the channel-wise Linears and
LayerNorms read contiguous rows.

What a block takes from the prompt or the time does not change from step to step: `condition` and `modulate` compute
it once a run, `forward` takes the result. Where no gradient is recorded, the tensor that is four times as wide as the
others is worked on in place.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import require

CACHED = 1 << 18  # numbers that a CPU works on at a time: they stay in its cache


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """(N,) times in [0, 1] -> (N, width): sines, then cosines, of t * 10000 at geometric frequencies, in float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * 10000 * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def check_heads(width: int, heads: int) -> None:
    """Raises WuerstchenError unless attention of this width can have so many heads."""
    require(width % heads == 0, f"heads are {heads}: they must divide the width, {width}")


def check_time(width: int, dropout: float) -> None:
    """Raises WuerstchenError unless times can be embedded in this width, and the dropout is a share."""
    require(width >= 4 and width % 2 == 0, f"time_width is {width}: it must be even, and at least 4")
    require(0 <= dropout < 1, f"dropout is {dropout}: it must be from 0 to below 1")


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), without affine parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return to_planes(F.layer_norm(to_rows(x), (x.shape[1],), eps=1e-6))


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's global response normalisation of (B, H, W, C) over H and W; without a gradient, in place."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        norm = _norm(x)
        response = (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
        gamma, beta = self.gamma.to(x), self.beta.to(x)
        return torch.addcmul(beta, x, 1 + gamma * response, out=None if torch.is_grad_enabled() else x)


def _norm(x: Tensor) -> Tensor:
    """(B, H, W, C) -> the L2 norm over H and W of every channel, (B, 1, 1, C) in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
    rows = x.flatten(1, 2)  # on a CPU several times as fast: vector_norm goes through a channels-last tensor by columns
    parts = rows.split(max(1, CACHED // (x.shape[0] * x.shape[-1])), dim=1)
    squares = torch.stack([part.to(wide).square().sum(dim=1) for part in parts]).sum(dim=0)
    return squares.sqrt()[:, None, None]


class ResBlock(nn.Module):
    """Depthwise convolution, then a channel-wise MLP with GRN.

    `skip` channels (Stage B's way down) join after the norm; `semantic` channels (the condition of Stage B) have a
    Linear of their own, so that their share of the sum is known before the first step.
    """

    def __init__(self, channels: int, skip: int = 0, semantic: int = 0, dropout: float = 0.0, operations=nn):
        super().__init__()
        self.depthwise = operations.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = LayerNorm2d()
        self.channelwise = nn.Sequential(
            operations.Linear(channels + skip, channels * 4),
            nn.GELU(),
            GlobalResponseNorm(channels * 4),
            nn.Dropout(dropout),
            operations.Linear(channels * 4, channels),
        )
        self.semantic = operations.Linear(semantic, channels * 4, bias=False) if semantic else None

    def forward(self, x: Tensor, skip: Tensor | None = None, share: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, C, H, W), skip (B, skip, H, W), share: (B, H, W, K) and a matrix (4C, K) that takes it to the semantic
        part of the first Linear."""
        widen, activation, response, dropout, narrow = self.channelwise
        h = self.norm(self.depthwise(x))
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        h = widen(to_rows(h))
        if share is not None:
            h = _add_product(h, *share)
        return x + to_planes(narrow(dropout(response(gelu(activation, h)))))


def _add_product(h: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """h (B, H, W, C) + rows (B, H, W, K) @ matrix (C, K), transposed"""
    if torch.is_grad_enabled():
        return h + F.linear(rows, matrix)
    rows = rows.expand(h.shape[0], -1, -1, -1).flatten(0, 2)
    return h.flatten(0, 2).addmm_(rows.to(h.dtype), matrix.T.to(h.dtype)).view(h.shape)


def gelu(module: nn.Module, x: Tensor) -> Tensor:
    """The module's exact GELU; without a gradient, in place."""
    return module(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class TimestepBlock(nn.Module):
    """Scale and shift by the time."""

    def __init__(self, channels: int, time_width: int, operations=nn):
        super().__init__()
        self.mapper = operations.Linear(time_width, channels * 2)

    def modulate(self, embedding: Tensor) -> Tensor:
        """(N, time_width) -> (N, 2C, 1, 1)"""
        return self.mapper(embedding)[:, :, None, None]

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """Multi-head attention with biases everywhere; the four projections carry diffusers' names.

    In training mode each attention weight is dropped with probability `dropout`.
    """

    def __init__(self, channels: int, heads: int, dropout: float = 0.0, operations=nn):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.to_q = operations.Linear(channels, channels)
        self.to_k = operations.Linear(channels, channels)
        self.to_v = operations.Linear(channels, channels)
        self.to_out = nn.ModuleList([operations.Linear(channels, channels)])

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) -> keys and values of all heads, (B, L, C)"""
        return self.to_k(tokens), self.to_v(tokens)

    def forward(
        self,
        tokens: Tensor,
        context: tuple[Tensor, Tensor] | None,
        size: tuple[int, int] | None = None,
        window: int | None = None,
    ) -> Tensor:
        """tokens (B, N, C) attend to themselves and to the context's keys and values.

        With a window, tokens that are the `size` (rows, columns) of a picture see a square of this side around them.
        """
        query, (keys, values) = self.to_q(tokens), self.keys_values(tokens)

        def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if context is not None:
                keys, values = (
                    torch.cat([own, given.repeat(len(own) // len(given), 1, 1)], dim=1)
                    for own, given in zip((keys, values), context, strict=True)
                )
            dropout = self.dropout if self.training else 0.0
            query, keys, values = map(self._split, (query, keys, values))
            attended = F.scaled_dot_product_attention(query, keys, values, dropout_p=dropout)
            return rearrange(attended, "b heads n c -> b n (heads c)")

        if window is None or size is None or max(size) <= window:
            return self.to_out[0](attend(query, keys, values))
        return self.to_out[0](in_windows(attend, query, keys, values, size, window))

    def _split(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b n (heads c) -> b heads n c", heads=self.heads)


class AttnBlock(nn.Module):
    """Attention from the latent's positions to themselves and to the text."""

    def __init__(self, channels: int, text_width: int, heads: int, dropout: float = 0.0, operations=nn):
        super().__init__()
        self.norm = LayerNorm2d()
        self.attention = Attention(channels, heads, dropout, operations)
        self.kv_mapper = nn.Sequential(nn.SiLU(), operations.Linear(text_width, channels))

    def condition(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, text_width) -> the text's keys and values"""
        return self.attention.keys_values(self.kv_mapper(text))

    def forward(self, x: Tensor, context: tuple[Tensor, Tensor] | None, window: int | None = None) -> Tensor:
        """x (B, C, H, W); with a window, positions see those of a square of this side around them, and the text."""
        rows, columns = x.shape[-2:]
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        attended = self.attention(tokens, context, (rows, columns), window)
        return x + rearrange(attended, "b (h w) c -> b c h w", h=rows, w=columns)


def in_windows(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    size: tuple[int, int],
    window: int,
) -> Tensor:
    """`attend(query, keys, values)`, all (B, rows * columns, C), where positions see only those around them.

    Positions are taken in squares of half a window's side, and each square sees the window that has it in its middle,
    or, near an edge, the nearest window within the picture. So all see as many positions, and the windows of two
    neighbours share half of what they see or more: no border shows. A row of windows is one batch.
    """
    query, keys, values = (rearrange(one, "b (h w) c -> b h w c", h=size[0]) for one in (query, keys, values))
    attended = torch.empty_like(query)
    across = list(_windows(size[1], window))
    for own, seen in _windows(size[0], window):
        queries = torch.cat([query[:, own, columns].flatten(1, 2) for columns, _ in across])
        around = (torch.cat([one[:, seen, columns].flatten(1, 2) for _, columns in across]) for one in (keys, values))
        parts = attend(queries, *around).chunk(len(across))
        for (columns, _), part in zip(across, parts, strict=True):
            place = attended[:, own, columns]
            place.copy_(part.view_as(place))
    return attended.flatten(1, 2)


def _windows(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Along one side: the positions of a square, and those of the window that it sees; each of the same length."""
    seen = min(window, length)
    own = length if length <= window else max(1, window // 2)
    for i in range(-(-length // own)):
        start = min(i * own, length - own)  # the last one ends at the edge, and may overlap the one before
        first = min(max(0, start - (seen - own) // 2), length - seen)
        yield slice(start, start + own), slice(first, first + seen)


def to_rows(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b h w c")


def to_planes(x: Tensor) -> Tensor:
    return rearrange(x, "b h w c -> b c h w")
