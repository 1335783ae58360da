"""Compiled networks: each kind of block once, by `torch.compile`; on a GPU a whole step as one CUDA graph."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..util.errors import WuerstchenError, first_line, readable
from .blocks import AttnBlock, ResBlock, TimestepBlock
from .stage_a import MixingBlock
from .stage_b import DiffNeXt
from .stage_c import Prior

BLOCKS = (ResBlock, TimestepBlock, AttnBlock, MixingBlock)
KINDS = 128  # of blocks, by their shapes, that stay compiled; torch's limit of 8 is less than Stage B has


def compile_networks(networks: Iterable[nn.Module], backend: str | Callable = "inductor") -> None:
    """From now on the blocks of Stages A, B and C run compiled.

    Blocks of one kind and shape share what the first of them compiles; another size of picture or batch compiles anew.

    On a GPU a step of `denoise` is a CUDA graph as well, launched at once. `backend`: torch.compile's.

    Raises:
        WuerstchenError: torch.compile does not work here, as where there is no compiler.
    """
    import torch._dynamo.config as dynamo

    networks = list(networks)
    for device in {next(network.parameters()).device for network in networks}:
        _try_compiler(device, backend)
    dynamo.recompile_limit = max(dynamo.recompile_limit, KINDS)
    for network in networks:
        for block in network.modules():
            if isinstance(block, BLOCKS):
                block.compile(dynamic=False, backend=backend)
        if next(network.parameters()).is_cuda and isinstance(network, Prior | DiffNeXt):
            network.denoise = CUDAGraphs(network.denoise)  # type: ignore[method-assign]


def _try_compiler(device: torch.device, backend: str | Callable) -> None:
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # what torch raises depends on the compiler that it looked for
        cause = first_line(getattr(error, "inner_exception", error))
        raise WuerstchenError(
            f"torch.compile does not work here ({readable(cause)}): it needs a C++ compiler such as g++, "
            "on a GPU Triton as well; without them do not compile"
        ) from error


class CUDAGraphs:
    """`denoise`, recorded at a run's second step and replayed from then on; its first step runs as it is.

    A run is known by its condition: the weights must stay where they are while one goes on.
    """

    def __init__(self, denoise: Callable[[Tensor, list[Tensor], Any], Tensor]):
        self.denoise = denoise
        self.condition: Any = None
        self.kind: list[tuple[torch.Size, torch.dtype]] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, modulation: list[Tensor], condition: Any) -> Tensor:
        kind = [(part.shape, part.dtype) for part in (x, *modulation)]
        if condition is not self.condition or kind != self.kind:
            self.condition, self.kind, self.graph = condition, kind, None
            return self.denoise(x, modulation, condition)
        if self.graph is None:
            self.x, self.modulation = x.clone(), [part.clone() for part in modulation]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.denoise(self.x, self.modulation, condition)
        for recorded, given in zip((self.x, *self.modulation), (x, *modulation), strict=True):
            recorded.copy_(given)
        self.graph.replay()
        return self.result.clone()
