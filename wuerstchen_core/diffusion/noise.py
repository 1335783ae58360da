"""The noise of a run, by its seed."""

import random
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from ..util.errors import WuerstchenError

MAX_INDEX = 65_536  # of a picture in its batch: the noise of all before it is drawn with it


def noise_source(latent: Tensor, seed: int, batch_index: list[int] | None) -> Callable[[], Tensor]:
    """Standard normal noise in the latent's shape at every call, drawn on the CPU.

    Each call has a generator of its own, the first one the seed's, so that a picture gets the same noise whatever the
    size of its batch.
    """
    index = list(range(latent.shape[0])) if batch_index is None else [int(i) for i in batch_index]
    if len(index) != latent.shape[0] or not 0 <= min(index) <= max(index) < MAX_INDEX:
        raise WuerstchenError(
            f"batch_index has {len(index)} numbers for {latent.shape[0]} latents: it must have one for each, "
            f"from 0 to {MAX_INDEX - 1}"
        )
    later = random.Random(seed)
    seeds = chain([seed], iter(lambda: later.getrandbits(63), None))

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(next(seeds))
        return torch.randn(max(index) + 1, *latent.shape[1:], generator=generator)[index].to(latent.device)

    return draw


def noise_of_each(latent: Tensor, seeds: Sequence[int]) -> Callable[[], Tensor]:
    """As `noise_source`, with a seed for each picture: each gets the noise that it would get alone.

    Raises WuerstchenError if there are more or fewer seeds than pictures.
    """
    if len(seeds) != len(latent):
        raise WuerstchenError(f"there are {len(seeds)} seeds for {len(latent)} latents: give one for each of them")
    draws = [noise_source(one, seed, None) for one, seed in zip(latent.split(1), seeds, strict=True)]
    return lambda: torch.cat([draw() for draw in draws])
