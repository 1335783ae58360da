"""The training loop: AdamW, warm-up, averaged weights (EMA), and checkpoints that a run resumes from exactly.

It runs on one process, or on those that `accelerate launch` starts (DDP or FSDP). A step's batch,
learning rate and random numbers follow from its number alone: a checkpoint holds no random states, and no position in
the data but the number of steps.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...util.errors import WuerstchenError, first_line, readable
from ..data.feature_cache import FeatureCache
from ..options import check_above_zero, check_at_least, check_shares, option
from .blocks import checkpoint_blocks, compile_blocks
from .draws import Draws
from .interrupts import Agreement, Interrupts
from .lock import locked
from .monitor import Monitor
from .optimizer import MOMENTS
from .state import RunState, together
from .task import Task
from .weights import unsharded

log = logging.getLogger(__name__)

PRECISIONS = ("", "no", "fp16", "bf16")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OVERFLOWS = 100  # consecutive steps whose float16 gradients may overflow, until their scale is found

Batches = Callable[[list, int, int], Iterator[dict]]  # (seen, rank, world) -> what `data.open_batches` gives


@dataclass(frozen=True)
class Plan:
    """Length of a run, learning rate, averaging, and how often it is saved."""

    steps: int = option(help="number of updates of the weights")
    learning_rate: float = option(1e-4, "AdamW's learning rate after the warm-up")
    warm_up: int = option(10_000, "steps in which the learning rate rises from 0 to its value")
    cool_down: float = option(0.0, "fraction of the steps, at the end, in which the learning rate falls to 0")
    optimizer: str = option(
        "adamw", "adamw, or adamw8bit: its state takes a quarter of the memory (needs bitsandbytes)"
    )
    beta1: float = option(0.9, "AdamW's decay of the mean of the gradients")
    beta2: float = option(0.999, "AdamW's decay of the mean of their squares")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    decay_all: bool = option(False, "let biases and gains decay as well, as the authors did")
    gradient_norm: float = option(1.0, "maximum gradient norm (clipping)")
    accumulate: int = option(1, "batches per step (gradient accumulation)")
    ema_every: int = option(100, "steps between two updates of the average of the weights (EMA)")
    ema_decay: float = option(0.9, "EMA decay; at update n at most n / (10 + n)")
    save_every: int = option(1000, "steps between two checkpoints, each with the averaged weights as loadable files")
    keep_checkpoints: int = option(2, "checkpoints that are kept, 2 at least; older ones are checkpoint-STEP.pt")
    sample_every: int = option(1000, "steps between two grids of samples; 0: none")
    log_every: int = option(10, "steps between two entries in tensorboard's logs")
    mixed_precision: str = option("", "no, fp16 or bf16; empty: as `accelerate launch` says, otherwise no")
    tf32: bool = option(True, "compute float32 products on a GPU in TF32: several times as fast, and 10 bits precise")
    compile: bool = option(False, "compile the networks' blocks (torch.compile): slow at first, faster from then on")
    gradient_checkpointing: bool = option(False, "recompute activations for the gradient: less memory, a third slower")
    dtype: str = option("float32", "precision of the weights in the loadable files: float32, float16 or bfloat16")
    seed: int = option(0, "seed of the initial weights, the order of the data and everything else that is random")

    def __post_init__(self):
        check_at_least(1, self, "steps", "accumulate", "ema_every", "save_every", "log_every")
        check_at_least(0, self, "warm_up", "sample_every", "seed", "weight_decay")
        check_above_zero(self, "learning_rate", "gradient_norm")
        check_at_least(2, self, "keep_checkpoints")
        check_shares(self, "cool_down", "ema_decay")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise WuerstchenError(f"{name} is {getattr(self, name)}: it must be from 0 to below 1")
        known_of = {"mixed_precision": PRECISIONS, "dtype": tuple(DTYPES), "optimizer": tuple(MOMENTS)}
        for name, known in known_of.items():
            if getattr(self, name) not in known:
                raise WuerstchenError(f"{name} is {getattr(self, name)!r}: take one of {', '.join(known).lstrip(', ')}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: warm-up, constant, cool-down to 0."""
        warming = (step + 1) / self.warm_up if self.warm_up else 1.0
        cooling = (self.steps - step) / (self.cool_down * self.steps) if self.cool_down else 1.0
        return self.learning_rate * min(1.0, warming, cooling)

    def decay(self, averaged: int) -> float:
        """The EMA decay at the average's `averaged`-th update, counted from 1: lower at first."""
        return min(self.ema_decay, averaged / (10 + averaged))


def train(
    task: Task,
    plan: Plan,
    folder: str | Path,
    batches: Batches,
    cache: FeatureCache | None = None,
    facts: Callable[[], dict] = dict,
    held_out: Callable[[], Iterator[dict]] | None = None,
) -> None:
    """Train `task` to the end of the plan, from where the last run in `folder` stopped.

    The folder gets `checkpoint.pt` (and the one before it, `checkpoint-before.pt`), the averaged weights as the loaders
    take them (`Task.export`), `samples/` and tensorboard's `logs/`. Of several processes the first one writes them and
    locks the folder; all of them read the checkpoint.

    Args:
        batches: opens the data for one of the processes, after what was `seen`: pairs (number of batches, pictures in
            each of them in all processes together).
        cache: keeps what the task's frozen networks make of samples; the one that `batches` reads from.
        facts: what the batches depend on; a change since the checkpoint is told (see `record`).
        held_out: opens the pictures on which the averaged weights' loss is measured at every checkpoint.

    Raises:
        WuerstchenError: another run is using the folder, a loss, a gradient or the weights are not finite, something
            can't be written, the data ran out, another process was lost, or the checkpoint belongs to another task.
            What was saved before is intact.
        KeyboardInterrupt: SIGINT or SIGTERM came; the run was saved, and the message says how to go on.
    """
    accelerator = _accelerator(plan, task)
    folder = Path(folder)
    state = RunState(task, plan, folder, accelerator, facts)
    with ExitStack() as stack:
        try:
            together(accelerator, lambda: stack.enter_context(_kept(folder)) and None)
            stack.enter_context(_tf32(plan.tf32))
            _train(state, batches, cache, held_out)
        except (RuntimeError, MemoryError) as error:
            explained = _explained(error, state)
            if explained is None:
                raise
            raise explained from error


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """The run's folder, made and locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WuerstchenError(f"{folder}: the run can't be kept there ({error.strerror})") from error
    with locked(folder):
        yield


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Within the context NVIDIA GPUs may round the factors of float32 products to TF32; CPUs stay exact."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, cudnn.fp32_precision
    matmul.fp32_precision = cudnn.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.fp32_precision = before


def _train(
    state: RunState,
    batches: Batches,
    cache: FeatureCache | None,
    held_out: Callable[[], Iterator[dict]] | None,
) -> None:
    task, plan, folder, accelerator = state.task, state.plan, state.folder, state.accelerator
    dtype = DTYPES[plan.dtype]
    first = state.resume()
    if first >= plan.steps:
        state.export(first, dtype)
        accelerator.print(f"{folder}: all of its {first} steps are done; to go on, give more with --steps")
        return
    if plan.gradient_checkpointing:
        checkpoint_blocks(task)
    if plan.compile:
        compile_blocks(task)
    model, optimizer = state.prepare()
    stream = batches(state.seen, accelerator.process_index, accelerator.num_processes)
    is_launched = accelerator.num_processes > 1
    with (
        Monitor(folder, first, plan.steps, accelerator.is_main_process) as monitor,
        Interrupts(is_launched) as interrupts,
    ):
        agreement = Agreement(accelerator.num_processes)
        learner = _Learner(task, model, optimizer, plan, accelerator, cache, state)
        for step in range(first, plan.steps):
            try:
                micro_batches = [next(stream) for _ in range(plan.accumulate)]
            except (WuerstchenError, RuntimeError) as error:
                learner.results()
                if accelerator.num_processes == 1 and step > state.saved:
                    state.save(step, dtype, monitor)
                if isinstance(error, WuerstchenError):
                    raise
                raise WuerstchenError(
                    f"a process that loads data has ended ({first_line(error)}): was there too little memory? Try "
                    f"fewer --workers; {state.remains()}, and the same command goes on from there"
                ) from error
            interrupts.defer_loaders()
            learner.step(step, micro_batches)
            monitor.advance()
            done = step + 1
            stop = agreement.any(interrupts.asked)
            logs = done % plan.log_every == 0 or done == plan.steps
            saves = done % plan.save_every == 0 or done == plan.steps or stop
            if logs or saves:
                results = learner.results()
                pictures = sum(len(batch["key"]) for batch in micro_batches) * accelerator.num_processes
                speed = monitor.report([sum(losses.values()) for losses, _ in results], pictures, accelerator.device)
                if logs:
                    losses, norm = results[-1]
                    values = {f"loss/{name}": loss for name, loss in losses.items()}
                    values |= {"gradient_norm": norm, "learning_rate": plan.rate(step)}
                    with state.told(folder / "logs"):
                        monitor.log(done, values | speed)
            if done % plan.ema_every == 0:
                state.average(plan.decay(done // plan.ema_every))
            if saves:
                state.save(done, dtype, monitor)
                if held_out is not None and not stop:
                    together(accelerator, partial(_validate, learner, state.shown(done), held_out, done, monitor))
            if plan.sample_every and not stop and (done % plan.sample_every == 0 or done == plan.steps):
                together(accelerator, partial(monitor.samples, done, state.shown(done)))
            if logs or saves:
                monitor.restart()
            if stop and done < plan.steps:
                raise KeyboardInterrupt(
                    f"stopped after step {done}, which {state.checkpoints.last} has: the same command goes on from "
                    "there"
                )
    accelerator.print(f"{folder}: done; it has {', '.join(path.name for path in state.exported)}")


@torch.no_grad()
def _validate(
    learner: "_Learner", shown: Task | None, held_out: Callable[[], Iterator[dict]], step: int, monitor: Monitor
) -> None:
    """Logs the means of the losses over the held-out pictures, each with the same noise every time."""
    assert shown is not None  # on the main process
    sums: dict[str, float] = {}
    count = 0
    for number, batch in enumerate(held_out()):
        count += 1
        draws = Draws("validation", step, len(batch["key"]), micro=number, device=learner.accelerator.device)
        with learner.accelerator.autocast():
            losses = shown(learner.featured(batch), draws)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.item()
    with learner.state.told(learner.state.folder / "logs"):
        monitor.log(step, {f"validation/{name}": total / count for name, total in sums.items()})


def _explained(error: Exception, state: RunState) -> WuerstchenError | None:
    """What the user can do about an error of torch's, or None."""
    told = str(error)
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in told:
        return WuerstchenError(
            f"out of memory ({first_line(error)}): try a smaller --batch with more --accumulate, or "
            f"--gradient-checkpointing true; {state.remains()}"
        )
    if state.accelerator.num_processes > 1:
        if isinstance(error, dist.DistError) or any(name in told for name in ("gloo", "NCCL", "ncclInternal")):
            reason = readable(first_line(error), 150)
            return WuerstchenError(
                f"another process of this run has ended, or can't be reached ({reason}); {state.remains()}: "
                "once all of them have ended, the same command goes on from there"
            )
    return None


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
    waiting: list[tuple[int, list[str], Tensor]] = field(default_factory=list)  # steps whose results are on the device

    def step(self, step: int, batches: list[dict]) -> None:
        """One update of the weights. Nothing waits for the device: what has come out is known from `results`."""
        plan, accelerator = self.plan, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(step) * group["rate"]
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            is_last = i == plan.accumulate - 1
            with nullcontext() if is_last else accelerator.no_sync(self.model):
                own = self._forward(step, batch)
                accelerator.backward(sum(own.values()))
            for name, loss in own.items():
                sums[name] = sums.get(name, 0) + loss.detach().float() / plan.accumulate
        norm = unsharded(accelerator.clip_grad_norm_(self.model.parameters(), plan.gradient_norm))
        self.waiting.append((step, list(sums), torch.stack([*sums.values(), norm.to(accelerator.device).float()])))
        try:
            self.optimizer.step()
        except (RuntimeError, OverflowError) as error:
            if "overflow" not in str(error):
                raise
            raise self.state.failure(step + 1, "the update of its weights overflows") from error

    def results(self) -> list[tuple[dict[str, float], float]]:
        """The losses and the gradient norm of each step since the last call, averaged over all processes.

        Raises WuerstchenError, in all processes, if they are not finite.
        """
        if not self.waiting:
            return []
        waiting, self.waiting = self.waiting, []
        numbers = iter(self.accelerator.reduce(torch.cat([row for _, _, row in waiting]), "mean").tolist())
        found = []
        for step, names, row in waiting:  # a loss may begin at a later step
            *values, norm = islice(numbers, len(row))
            losses = dict(zip(names, values, strict=True))
            self._check(step, losses, norm)
            found.append((losses, norm))
        return found

    def _forward(self, step: int, batch: dict) -> dict[str, Tensor]:
        accelerator, seed, state = self.accelerator, self.plan.seed, self.state
        rank, world = accelerator.process_index, accelerator.num_processes
        micro = sum(count for count, _ in state.seen)
        torch.manual_seed(hash((seed, micro, rank)))  # of dropout
        count = len(batch["key"])
        first = sum(batches * pictures for batches, pictures in state.seen) + rank * count
        draws = Draws(seed, step, count, micro=micro, first=first, device=accelerator.device)
        state.count(world * count)
        with accelerator.autocast():
            return self.model(self.featured(batch), draws)

    @torch.no_grad()
    def featured(self, batch: dict) -> dict:
        """The batch on the device with its features, which are rounded to float16 whether cached or not."""
        device = self.accelerator.device
        batch = dict(batch)
        if "image" in batch:
            image = batch["image"].to(device, non_blocking=True)
            batch["image"] = image if image.is_floating_point() else image.float() / 255
        if "features" in batch:
            features = batch["features"]
        else:
            features = {name: _half(value) for name, value in self.task.features(batch).items()}
            if self.cache is not None:
                self.cache.write(batch["address"], features)
        return batch | {
            "features": {
                name: value.to(device, torch.float32 if value.is_floating_point() else None, non_blocking=True)
                for name, value in features.items()
            }
        }

    def _check(self, step: int, losses: dict[str, float], norm: float) -> None:
        """Raises WuerstchenError, in all processes, if losses or gradients are not finite."""
        overflows = self.accelerator.scaler is not None and not math.isfinite(norm)
        self.overflows = self.overflows + 1 if overflows else 0
        passes = overflows and self.overflows < OVERFLOWS
        if all(map(math.isfinite, losses.values())) and (math.isfinite(norm) or passes):
            return
        told = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise self.state.failure(step + 1, f"loss {told}, gradient norm {norm:.4g}", suspect=True)


def _half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def _accelerator(plan: Plan, task: Task):
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
