"""Counting the memory that tensors take, also where they have no values."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """The most bytes that lie in storages at once, without those that were there before."""

    def __init__(self, network):
        super().__init__()
        self.bytes = self.most = 0
        weights = (*network.parameters(), *network.buffers())
        self.known = {id(weight.untyped_storage()): weight.untyped_storage() for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in self.known:
                self.known[id(storage)] = None
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self.freed, id(storage), storage.nbytes())
        return result

    def freed(self, key, nbytes):
        self.bytes -= nbytes
        del self.known[key]


def allocated(network, work):
    """The most bytes that `work` takes on the meta device, as attention that keeps no scores does."""
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.device("meta"),
        torch.inference_mode(),
        Allocated(network) as memory,
    ):
        patch.setattr(F, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
        work()
    return memory.most
