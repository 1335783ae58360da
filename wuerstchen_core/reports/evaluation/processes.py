"""One set, several processes: those that `accelerate launch` starts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch

from ...bulk.plan import Share
from ...util.errors import WuerstchenError, readable

ALONE = Share()
LONGEST = timedelta(days=2)  # that one process waits for another

T = TypeVar("T")


@contextmanager
def joined(device: str) -> Iterator[Share]:
    """This process's part of the work, once all that were launched are there. Where none were, it has all of it.

    Raises WuerstchenError if accelerate is missing.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise WuerstchenError(
            f"several processes need accelerate, which can't be imported ({readable(error)}): pip install -e '.[train]'"
        ) from error
    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=LONGEST)
    try:
        yield Share(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()


def gathered(share: Share, work: Callable[[], list[T]]) -> list[T]:
    """What the work of all processes gives, in each of them.

    Raises in all of them the WuerstchenError of the first one that has one, after the others' work is done.
    """
    if share.world == 1:
        return work()
    from accelerate.utils import gather_object

    own: tuple[list[T], str | None]
    try:
        own = work(), None
    except WuerstchenError as error:
        own = [], str(error)
    results = gather_object([own])
    for _, told in results:
        if told is not None:
            raise WuerstchenError(told)
    return [one for several, _ in results for one in several]
