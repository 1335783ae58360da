"""The training loop: updates of the weights, their average (EMA), and checkpoints that a run resumes from exactly.

It runs on one process, or on those that `accelerate launch` starts (DDP or FSDP). A step's batch,
learning rate and random numbers follow from its number alone: a checkpoint holds no random states, and no position in
the data but the number of steps.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ...util.errors import WuerstchenError, first_line, readable
from ..data.feature_cache import FeatureCache
from .blocks import checkpoint_blocks, compile_blocks
from .draws import Draws
from .interrupts import Agreement, Interrupts
from .learner import Learner
from .lock import locked
from .monitor import Monitor
from .plan import Plan
from .processes import accelerator_for
from .state import RunState, together
from .task import Task

Batches = Callable[[list, int, int], Iterator[dict]]  # (seen, rank, world) -> what `data.open_batches` gives


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
    accelerator = accelerator_for(plan, task)
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
    dtype = plan.exported_dtype
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
        learner = Learner(task, model, optimizer, plan, accelerator, cache, state)
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
    learner: Learner, shown: Task | None, held_out: Callable[[], Iterator[dict]], step: int, monitor: Monitor
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
