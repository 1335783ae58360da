"""Where a network overflows in float16 its run is done again in float32, as the core does it."""

from collections.abc import Callable

import comfy.samplers
import torch
from torch import Tensor

from ...wuerstchen_core.util.finite import is_finite
from ...wuerstchen_core.util.notices import tell_once


class _Overflow(Exception):
    """Leaves a run at its first step that is not finite."""


def in_wide_enough(guider: comfy.samplers.CFGGuider, run: Callable, callback: Callable | None) -> Tensor:
    """run(callback) -> its result. The weights stay as they are stored; each is cast as it is used."""
    patcher, model = guider.model_patcher, guider.model_patcher.model
    computed = patcher.get_model_object("manual_cast_dtype") or model.get_dtype()
    if computed != torch.float16:
        return run(callback)
    conds = {name: [entry.copy() for entry in entries] for name, entries in guider.conds.items()}

    def checked(step: int, clean: Tensor, *more) -> None:
        if not is_finite(clean):
            raise _Overflow
        if callback is not None:
            callback(step, clean, *more)

    try:
        sampled = run(checked)
        if is_finite(sampled):
            return sampled
    except _Overflow:
        pass
    tell_once(f"{model.STAGE} overflows in float16: it goes on in float32, slower and with more memory")
    guider.conds, guider.model_patcher = conds, patcher.clone()
    guider.model_patcher.set_model_compute_dtype(torch.float32)
    try:
        return run(callback)
    finally:
        guider.model_patcher = patcher
