"""The random numbers of training: they depend on a sample's number, not on process, device or resumption."""

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """The random numbers of one micro-batch: one generator per sample, seeded with the run's seed and its number.

    Two processes with half the batch each draw what one with the whole batch draws.
    """

    def __init__(self, seed: int | str, step: int, batch: int, *, micro: int | None = None, first: int | None = None,
                 rank: int = 0, world: int = 1, device: str | torch.device = "cpu"):  # fmt: skip
        """`micro` counts micro-batches from the beginning of the run (by default the step), `first` is the number of
        the first sample (by default, all micro-batches are as large as this one)."""
        self.step = step
        self.device = torch.device(device)
        micro = step if micro is None else micro
        first = (micro * world + rank) * batch if first is None else first
        self._generators = [_generator(seed, first + j) for j in range(batch)]
        self.common = random.Random(f"micro-batch {seed} {micro}")  # the same in all processes

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape) float32, standard normal; drawn on the CPU, given on the device."""
        return self._drawn(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1)"""
        return self._drawn(torch.rand, shape)

    def _drawn(self, draw, shape: Sequence[int]) -> Tensor:
        drawn = torch.stack([draw(tuple(shape), generator=one) for one in self._generators])
        if self.device.type == "cuda":
            drawn = drawn.pin_memory()  # from which the GPU reads without being waited for
        return drawn.to(self.device, non_blocking=True)


def _generator(seed: int | str, number: int) -> torch.Generator:
    digest = hashlib.blake2b(f"sample {seed} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
