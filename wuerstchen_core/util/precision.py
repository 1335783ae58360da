"""The precision of a network's weights, and what to do where it was too narrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import WuerstchenError
from .finite import is_finite

# Where to go on from a precision that was too narrow.
WIDER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}


class Overflow(WuerstchenError):
    """A network gave values that are not finite."""


def check_finite(result: Tensor, network: str, dtype: torch.dtype) -> Tensor:
    """The result itself; raises WuerstchenError if a value in it is NaN or infinite."""
    if is_finite(result):
        return result
    precision = str(dtype).removeprefix("torch.")
    hint = f"run it in {WIDER[dtype]}" if dtype in WIDER else "what it was given is not finite, or out of all range"
    raise Overflow(f"{network} gave values that are not finite in {precision}: {hint}")


@contextmanager
def in_float32(network: nn.Module) -> Iterator[None]:
    """The network's weights in float32, until it is left: then they are the ones that they were."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in network.modules():
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in held:
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32:
                        wide = tensor.float()
                        tensors[name] = nn.Parameter(wide, False) if isinstance(tensor, nn.Parameter) else wide
                        replaced.append((tensors, name, tensor))
        yield
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
