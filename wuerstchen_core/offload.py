"""One network at a time on a device: the others wait in the machine's memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .util.memory import free_memory

RESERVE = 4 << 30  # bytes on the device that are left to the network at work


class Offload:
    """`with offload(network, then=following):` has a network on the device.

    The one that works next is copied to the device meanwhile, if there is room for both: on a GPU from pinned memory,
    on a stream of its own. What lies in the machine's memory stays as it is; a network that is done leaves the device
    without being copied back, as sampling changes no weights.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._coming: dict[nn.Module, list[Copied]] = {}

    @contextmanager
    def __call__(self, network: nn.Module, then: nn.Module | None = None) -> Iterator[None]:
        copies = self._coming.pop(network, None) or self._copy(network)
        self._finish(copies)
        try:
            for tensors, name, _, copied in copies:
                tensors[name] = copied
            if then is not None and self._has_room(then):
                self._coming[then] = self._copy(then)
            yield
        except BaseException:
            self._coming.clear()
            raise
        finally:
            for tensors, name, waiting, _ in copies:
                tensors[name] = waiting

    @torch.inference_mode(False)
    def _copy(self, network: nn.Module) -> "list[Copied]":
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            copies = []
            for tensors, name, tensor in _parameters_of(network):
                waiting = tensor if self._stream is None or tensor.is_pinned() else _like(tensor, tensor.pin_memory())
                copied = waiting.detach().to(self.device, non_blocking=True, copy=True)
                copies.append((tensors, name, waiting, _like(tensor, copied)))
            return copies

    def _finish(self, copies: "list[Copied]") -> None:
        """Makes the work that follows wait for the copies, and their memory for that work."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for *_, copied in copies:
                copied.record_stream(current)

    def _has_room(self, network: nn.Module) -> bool:
        free = free_memory(self.device)
        return free is not None and bytes_of(network) + RESERVE <= free


Copied = tuple[dict[str, Any], str, Tensor, Tensor]  # where it lies under which name, in the machine, on the device


def bytes_of(*networks: nn.Module) -> int:
    """What the weights and buffers of networks take; a network that is given twice counts once."""
    return sum(tensor.nbytes for network in set(networks) for *_, tensor in _parameters_of(network))


def must_offload(networks: list[nn.Module], device: torch.device | str) -> bool:
    """Whether a device other than the CPU cannot hold all of them beside what they need to work."""
    free = free_memory(device)
    return torch.device(device).type != "cpu" and free is not None and bytes_of(*networks) + RESERVE > free


def _like(tensor: Tensor, copied: Tensor) -> Tensor:
    """The copy as a parameter, if it is one of a parameter."""
    return nn.Parameter(copied.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _parameters_of(network: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Every parameter and buffer: the dictionary that holds it, its name there, and itself."""
    for module in network.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield tensors, name, tensor
