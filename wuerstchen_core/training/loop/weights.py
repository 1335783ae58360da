"""Weights of tasks by name: their average, their shards, and what may be wrong with them."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .task import Task


def averaging_copy(task: Task) -> Task:
    """A copy in eval mode that shares with the task what is not learned."""
    shared = [*task.frozen, *(parameter for parameter in task.parameters() if not parameter.requires_grad)]
    copied = copy.deepcopy(task, {id(one): one for one in shared})
    return copied.eval()


@torch.no_grad()
def move_average(averaged: Task, weights: dict[str, Tensor], decay: float) -> None:
    for name, value in averaged.learned().items():
        now = weights[name].to(value.device)
        if value.is_floating_point():
            value.lerp_(now, 1 - decay)
        else:
            value.copy_(now)


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; then all processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors: dict[str, Tensor], is_main: bool) -> dict[str, Tensor]:
    """Shards -> whole tensors on the CPU, on the main process alone; all processes must call it."""
    whole = {}
    for name, tensor in tensors.items():
        full = unsharded(tensor)
        if is_main:
            whole[name] = full.cpu() if isinstance(full, Tensor) else full
    return whole


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no value of floats on one device, or of this process's shards, is NaN or infinite: a boolean there.

    Each is read once, and nothing waits for the device.
    """
    local = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]
    extremes = [one.float() for each in local if each.is_floating_point() and each.numel() for one in each.aminmax()]
    return torch.stack(extremes).isfinite().all() if extremes else torch.tensor(True)


def sharded(values: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Whole tensors -> this process's shards of them, laid out as the parameter is; numbers stay as they are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return values
    return {
        name: distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        if isinstance(value, Tensor) and value.shape == like.shape
        else value
        for name, value in values.items()
    }


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The names whose shapes differ, with both shapes."""
    for name in [*ours, *theirs]:
        here, there = (_shape(held.get(name)) for held in (ours, theirs))
        if here != there:
            yield str(name), here, there


def _shape(value: Any) -> Any:
    if value is None:
        return "missing"
    return list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
