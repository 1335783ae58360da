"""The training of a task: AdamW, warm-up, averaged weights, checkpoints from which a run goes on as if never stopped.

It runs on one process, or on those that `accelerate launch` starts (DDP or FSDP). What a step sees follows from its
number alone, and so do the learning rate and all that is random: a checkpoint needs no random states and no position in
the data but the number of steps.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...util.errors import WuerstchenError
from ..data.feature_cache import FeatureCache
from ..options import check_above_zero, check_at_least, check_shares, option
from .draws import Draws
from .gradient_checkpointing import checkpoint_blocks
from .interrupts import Interrupts
from .monitor import Monitor
from .state import RunState, together, unsharded
from .task import Task

log = logging.getLogger(__name__)

PRECISIONS = ("", "no", "fp16", "bf16")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OVERFLOWS = 100  # steps in a row that float16's gradients may overflow in, while their scale is looked for

Batches = Callable[[int, int, int], Iterator[dict]]  # (first, rank, world) -> what `data.open_batches` gives


@dataclass(frozen=True)
class Plan:
    """How long and how fast a network learns."""

    steps: int = option(help="number of updates of the weights")
    learning_rate: float = option(1e-4, "AdamW's learning rate, once it is warm")
    warm_up: int = option(10_000, "steps in which the learning rate rises to that")
    cool_down: float = option(0.0, "share of the steps, the last ones, in which the learning rate falls to zero")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    gradient_norm: float = option(1.0, "a longer gradient is shortened to this")
    accumulate: int = option(1, "batches to a step; as if the batch were so many times larger")
    ema_every: int = option(100, "steps between two averages of the weights")
    ema_decay: float = option(0.9, "share of the average that stays at each; less at the beginning")
    save_every: int = option(1000, "steps between two checkpoints, each with the averaged weights as loadable files")
    sample_every: int = option(1000, "steps between two grids of samples; 0: none")
    log_every: int = option(10, "steps between two entries in tensorboard's logs")
    mixed_precision: str = option("", "no, fp16 or bf16; empty: what `accelerate launch` says, else no")
    gradient_checkpointing: bool = option(False, "compute blocks again for the gradient: less memory, a third slower")
    dtype: str = option("float32", "of the weights in the loadable files: float32, float16 or bfloat16")
    seed: int = option(0, "of the first weights, the order of the data and all that is random")

    def __post_init__(self):
        check_at_least(1, self, "steps", "accumulate", "ema_every", "save_every", "log_every")
        check_at_least(0, self, "warm_up", "sample_every", "seed", "weight_decay")
        check_above_zero(self, "learning_rate", "gradient_norm")
        check_shares(self, "cool_down", "ema_decay")
        for name, known in (("mixed_precision", PRECISIONS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise WuerstchenError(f"{name} is {getattr(self, name)!r}: take one of {', '.join(known).lstrip(', ')}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: up, level, down to zero."""
        warming = (step + 1) / self.warm_up if self.warm_up else 1.0
        cooling = (self.steps - step) / (self.cool_down * self.steps) if self.cool_down else 1.0
        return self.learning_rate * min(1.0, warming, cooling)

    def decay(self, averaged: int) -> float:
        """What stays of the average at its `averaged`-th update, counted from 1: at first it forgets faster."""
        return min(self.ema_decay, averaged / (10 + averaged))


def train(task: Task, plan: Plan, folder: str | Path, batches: Batches, cache: FeatureCache | None = None) -> None:
    """Train `task` to the end of the plan, from where the last run in `folder` has stopped.

    The folder gets `checkpoint.pt`, the averaged weights as the loaders take them (`Task.export`), `samples/` and
    tensorboard's `logs/`. Of several processes the first one writes them; all of them read the checkpoint.

    Args:
        batches: opens the data behind its `first` batches, for one of the processes.
        cache: keeps what the task's frozen networks make of samples; the one that `batches` reads from.

    Raises:
        WuerstchenError: a loss or gradient is no number any more, something can't be written, the data gave out, or the
            checkpoint belongs to another task. What was saved before is intact.
        KeyboardInterrupt: SIGINT or SIGTERM came; the run was saved, and the message says how to go on.
    """
    accelerator = _accelerator(plan, task)
    folder = Path(folder)
    state = RunState(task, plan, folder, accelerator)
    first = state.resume()
    if first >= plan.steps:
        together(accelerator, lambda: state.export(DTYPES[plan.dtype]))
        accelerator.print(f"{folder}: all of its {plan.steps} steps are done; to go on, give more with --steps")
        return
    if plan.gradient_checkpointing:
        checkpoint_blocks(task)
    model, optimizer = state.prepare()
    stream = batches(first * plan.accumulate, accelerator.process_index, accelerator.num_processes)
    with Monitor(folder, first, plan.steps, accelerator.is_main_process) as monitor, Interrupts() as interrupts:
        learner = _Learner(task, model, optimizer, plan, accelerator, cache, state)
        for step in range(first, plan.steps):
            try:
                micro_batches = [next(stream) for _ in range(plan.accumulate)]
            except WuerstchenError:
                if accelerator.num_processes == 1 and step > state.saved:
                    state.save(step, DTYPES[plan.dtype], monitor)
                raise
            losses, norm, stop = learner.step(step, micro_batches, interrupts)
            done = step + 1
            monitor.progress(sum(losses.values()))
            if done % plan.log_every == 0 or done == plan.steps:
                with state.told(folder / "logs"):
                    monitor.log(done, losses, norm, plan.rate(step))
            if done % plan.ema_every == 0:
                state.average(plan.decay(done // plan.ema_every))
            if done % plan.save_every == 0 or done == plan.steps or stop:
                state.save(done, DTYPES[plan.dtype], monitor)
            if plan.sample_every and not stop and (done % plan.sample_every == 0 or done == plan.steps):
                together(accelerator, lambda: monitor.samples(done, state.averaged))
            if stop and done < plan.steps:
                raise KeyboardInterrupt(
                    f"stopped after step {done}, which {state.checkpoint} has: the same command goes on from there"
                )
    accelerator.print(f"{folder}: done; it has {', '.join(path.name for path in state.exported)}")


@dataclass
class _Learner:
    task: Task
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    plan: Plan
    accelerator: Any
    cache: FeatureCache | None
    state: RunState
    overflows: int = 0

    def step(self, step: int, batches: list[dict], interrupts: Interrupts) -> tuple[dict[str, float], float, bool]:
        """One update of the weights -> the losses and the gradient's norm, as all processes have them together, and
        whether one of them was asked to stop."""
        plan, accelerator = self.plan, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(step)
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            is_last = i == plan.accumulate - 1
            with nullcontext() if is_last else accelerator.no_sync(self.model):
                losses = self._forward(step, step * plan.accumulate + i, batch)
                accelerator.backward(sum(losses.values()))
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach().float() / plan.accumulate
        norm = unsharded(accelerator.clip_grad_norm_(self.model.parameters(), plan.gradient_norm))
        seen = torch.stack([*sums.values(), norm.to(accelerator.device).float()])
        seen = torch.cat([seen, seen.new_tensor([float(interrupts.asked)])])
        *values, norm, stop = accelerator.reduce(seen, "mean").tolist()
        losses = dict(zip(sums, values))
        self._check(step, losses, norm)
        self.optimizer.step()
        return losses, norm, stop > 0

    def _forward(self, step: int, micro: int, batch: dict) -> dict[str, Tensor]:
        accelerator, seed = self.accelerator, self.plan.seed
        rank, world = accelerator.process_index, accelerator.num_processes
        torch.manual_seed(hash((seed, micro, rank)))  # of dropout
        draws = Draws(seed, step, len(batch["key"]), micro=micro, rank=rank, world=world, device=accelerator.device)
        with accelerator.autocast():
            return self.model(self._featured(batch), draws)

    @torch.no_grad()
    def _featured(self, batch: dict) -> dict:
        """The batch on the device, with its features, rounded to float16 whether they come from the cache or not."""
        device = self.accelerator.device
        batch = dict(batch)
        if "image" in batch:
            batch["image"] = batch["image"].to(device)
        if "features" in batch:
            features = batch["features"]
        else:
            features = {name: _half(value) for name, value in self.task.features(batch).items()}
            if self.cache is not None:
                self.cache.write(batch["address"], features)
        return batch | {
            "features": {
                name: value.to(device).float() if value.is_floating_point() else value.to(device)
                for name, value in features.items()
            }
        }

    def _check(self, step: int, losses: dict[str, float], norm: float) -> None:
        """Raises WuerstchenError, in all processes, where there are losses or gradients that are no numbers."""
        overflows = self.accelerator.scaler is not None and not math.isfinite(norm)
        self.overflows = self.overflows + 1 if overflows else 0
        passes = overflows and self.overflows < OVERFLOWS
        if all(map(math.isfinite, losses.values())) and (math.isfinite(norm) or passes):
            return
        told = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        saved = f"the last good state is in {self.state.checkpoint}" if self.state.saved else "nothing was saved yet"
        raise WuerstchenError(
            f"step {step + 1} went wrong: loss {told}, gradient norm {norm:.4g}. Try a lower learning rate than "
            f"{self.plan.learning_rate:g}, a longer warm-up than {self.plan.warm_up}, or another precision; {saved}"
            + (f", of step {self.state.saved}" if self.state.saved else "")
        )


def _half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def _accelerator(plan: Plan, task: Task):
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise WuerstchenError("training needs accelerate: pip install -e '.[train]'") from error
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
    return accelerator


def _set_up_sharding(plugin) -> None:
    """FSDP2 as a task needs it: as one unit, since its networks are called part by part; with weights in the mixed
    precision, but what they are given, losses and the sum of gradients in float32."""
    if plugin.fsdp_version != 2:
        raise WuerstchenError("sharded training needs FSDP2: set fsdp_version to 2 (accelerate config)")
    plugin.auto_wrap_policy = None
    plugin.cpu_ram_efficient_loading = False
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
