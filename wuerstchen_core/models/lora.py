"""LoRA (arXiv 2106.09685): low-rank changes of Stage C's or Stage B's weights, and their application."""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..util.errors import WuerstchenError
from ..util.finite import is_finite
from .stage_b import DiffNeXt
from .stage_c import Prior

# What can be changed: Stage C's Linears and 1x1 convolutions, Stage B's, …
_IN_BLOCKS = r"channelwise\.[04]|mapper|kv_mapper\.1|attention\.to_(?:q|k|v|out\.0)"
MODULES = re.compile(rf"projection|cond_mapper\.[02]|out\.1|blocks\.\d+\.(?:{_IN_BLOCKS})")
MODULES_B = re.compile(
    rf"clip_mapper|effnet_mappers\.\d+|embedding\.1|clf\.1|(?:down|up)_blocks\.\d+\.\d+\.(?:semantic|{_IN_BLOCKS})"
)

# … and Stage C's depthwise 3x3 convolutions, which OneTrainer's LoRAs change.
DEPTHWISE = re.compile(r"blocks\.\d+\.depthwise")


class Change(NamedTuple):
    """The change of one weight: scale * up @ down, in the weight's shape.

    That of a depthwise convolution, (C, 1, 3, 3), is a matrix of (C, 9), or of (1, 9 C) as OneTrainer has it.
    """

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    alpha: float
    scale: float  # alpha / rank, or alpha / sqrt(rank) in rsLoRA

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def fits(self, weight: Tensor) -> bool:
        depthwise = weight.dim() == 4 and weight.shape[1] == 1 and self.shape == (1, weight.numel())
        return depthwise or self.shape == (weight.shape[0], weight[0].numel())

    def delta(self, device) -> Tensor:
        """(out, in) in float32"""
        delta = torch.zeros(self.shape, device=device)
        self.add_to(delta, 1.0)
        return delta

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Adds strength * delta to a weight in float32, in place: one matrix product and no more."""
        up, down = (half.to(weight.device, torch.float32) for half in (self.up, self.down))
        weight.view(self.shape).addmm_(up, down, alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class LoRA:
    """Changes of a Stage C's or a Stage B's weights, by the names of its modules.

    `left_out`: the names of what its file holds for other networks. `sampling`: how to sample with it (steps, cfg,
    sampler), where its file says so.
    """

    path: Path
    changes: dict[str, Change] = field(repr=False)
    left_out: list[str] = field(default_factory=list, repr=False)
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """ "Stage C" or "Stage B" """
        return "Stage B" if any(map(MODULES_B.fullmatch, self.changes)) else "Stage C"

    def check(self, network: Prior | DiffNeXt) -> None:
        """Raises WuerstchenError, naming the first module, where the changes are not of a network like this one."""
        stage = "Stage C" if isinstance(network, Prior) else "Stage B"
        if self.stage != stage:
            raise WuerstchenError(f"{self.path}: a LoRA for {self.stage}, and this is {stage}")
        of_depth, of_width = (
            (f", of depth {network.config.depth},", f", of width {network.config.width},")
            if isinstance(network, Prior)
            else ("", "")
        )
        for name, change in self.changes.items():
            try:
                weight = network.get_parameter(f"{name}.weight")
            except AttributeError as error:
                raise WuerstchenError(
                    f"{self.path}: a LoRA of another {stage}: it changes {name}, which this one{of_depth} has not"
                ) from error
            if not change.fits(weight):
                shape = weight.shape[0], weight[0].numel()
                raise WuerstchenError(
                    f"{self.path}: a LoRA of another {stage}: it changes {name} of {size_text(change.shape)}, which in "
                    f"this one{of_width} is {size_text(shape)}"
                )


@contextmanager
def apply_loras(network: Prior | DiffNeXt, loras: Iterable[tuple[LoRA, float]]) -> Iterator[None]:
    """Within the context the network's weights are W + sum of strength * scale * up @ down; after it, what they were.

    The sum is computed in float32 and rounded once. The weights themselves are put aside, not written to, and put back
    at the end.

    Raises:
        WuerstchenError: a LoRA is of another network, a strength is not finite, or a weight would not be. Nothing is
            changed then.
    """
    changes: dict[str, list[tuple[Change, float]]] = {}
    for lora, strength in loras:
        lora.check(network)
        if not math.isfinite(strength):
            raise WuerstchenError(f"{lora.path}: its strength is {strength}: it must be a finite number")
        if strength != 0:
            for name, change in lora.changes.items():
                changes.setdefault(name, []).append((change, strength))
    weights: dict[str, nn.Parameter] = {}
    try:
        for name, several in changes.items():
            weights[name] = network.get_parameter(f"{name}.weight")
            merged = _merged(weights[name], several)
            if not is_finite(merged):
                precision = str(merged.dtype).removeprefix("torch.")
                raise WuerstchenError(
                    f"the LoRAs change {name} beyond the range of {precision}: lower their strengths, or use float32"
                )
            network.get_submodule(name).weight = nn.Parameter(merged, requires_grad=False)
        yield
    finally:
        for name, weight in weights.items():
            network.get_submodule(name).weight = weight


@torch.no_grad()
def _merged(weight: Tensor, changes: list[tuple[Change, float]]) -> Tensor:
    merged = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for change, strength in changes:
        change.add_to(merged, strength)
    return merged.to(weight.dtype)


def size_text(shape) -> str:
    return "×".join(map(str, shape))
