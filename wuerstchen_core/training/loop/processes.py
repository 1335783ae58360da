"""The processes of a run and how they share its weights: one process, or those of `accelerate launch` (DDP, FSDP2)."""

import logging
import os
from dataclasses import replace

import torch

from ...util.errors import WuerstchenError, readable
from .plan import Plan
from .task import Task

log = logging.getLogger(__name__)


def accelerator_for(plan: Plan, task: Task):
    """accelerate's `Accelerator` of a run. Raises WuerstchenError if accelerate is missing, or can't run as planned."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise WuerstchenError(
            f"training needs accelerate, which can't be imported ({readable(error)}): pip install -e '.[train]'"
        ) from error
    try:
        accelerator = Accelerator(
            mixed_precision=plan.mixed_precision or None,
            gradient_accumulation_steps=plan.accumulate,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=task.leaves_out)],
        )
    except ValueError as error:
        raise WuerstchenError(f"mixed_precision {plan.mixed_precision}: {error}") from error
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        _set_up_sharding(accelerator.state.fsdp_plugin)
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        log.warning("FSDP was asked for, but accelerate shards nothing on the CPU: each process has all weights (DDP)")
    return accelerator


def _set_up_sharding(plugin) -> None:
    """FSDP2 as a task needs it: a unit for each block (`shard_blocks`) and one for the rest; weights in the mixed
    precision; inputs, losses and the sum of gradients in float32."""
    if plugin.fsdp_version != 2:
        raise WuerstchenError("sharded training needs FSDP2: set fsdp_version to 2 (accelerate config)")
    plugin.auto_wrap_policy = None
    plugin.cpu_ram_efficient_loading = False
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
