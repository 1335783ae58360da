"""The precision of a network's weights: the fast one of a device, and what to do where one was too narrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import WuerstchenError
from .finite import is_finite
from .notices import tell_once

# Where to go on from a precision that was too narrow.
WIDER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The precision that a device has matrix units for, in which Stage C and Stage B run; told once if not float32.

    bfloat16 on a CPU with AMX or AVX512-BF16 and on a GPU with it, float16 on older GPUs with tensor cores.
    """
    device = torch.device(device)
    dtype = torch.float32
    if device.type == "cpu" and _cpu_has_bfloat16():
        dtype = torch.bfloat16
    elif device.type == "cuda":
        dtype = _gpu_dtype(device)
    if dtype != torch.float32:
        tell_once(
            f"Stage C and Stage B compute in {name_of(dtype)}, for which this {device.type} has matrix units; "
            "for other precisions there is dtype (on the command line --dtype)"
        )
    return dtype


def _cpu_has_bfloat16() -> bool:
    instructions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    found = any(getattr(torch.cpu, name, lambda: False)() for name in instructions)
    return found and torch.backends.mkldnn.is_available()


def _gpu_dtype(device: torch.device) -> torch.dtype:
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32


class Overflow(WuerstchenError):
    """A network gave values that are not finite."""


def check_finite(result: Tensor, network: str, dtype: torch.dtype) -> Tensor:
    """The result itself; raises WuerstchenError if a value in it is NaN or infinite."""
    if is_finite(result):
        return result
    hint = f"run it in {WIDER[dtype]}" if dtype in WIDER else "what it was given is not finite, or out of all range"
    raise Overflow(f"{network} gave values that are not finite in {name_of(dtype)}: {hint}")


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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
