"""The state of a run at a step, in memory and on disk: weights, their average, the optimizer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...util.atomic import remove_partials
from ...util.errors import WuerstchenError, first_line
from . import record
from .blocks import shard_blocks
from .checkpoint import Checkpoints, Damaged
from .optimizer import MOMENTS, optimizer_for
from .task import Task
from .weights import all_finite, averaging_copy, differing, gathered, move_average, sharded

KEYS = {
    "task": str, "step": int, "seen": list, "weights": dict, "averaged": dict, "optimizer": dict, "scaler": object,
    "run": dict,
}  # fmt: skip


class RunState:
    """The state of a run and the folder that keeps it; only the main process writes there, and it holds its lock.

    `averaged`, on the main process alone, is a copy of the task with the averaged weights. `saved` is the last step
    that the checkpoint has. `seen` is what the run has been given: pairs (number of batches, pictures in each of them
    in all processes together). `facts` gives what the batches depend on (see `record`); it is asked there, too.
    """

    def __init__(self, task: Task, plan, folder: Path, accelerator, facts: Callable[[], Mapping[str, Any]]):
        self.task, self.plan, self.folder, self.accelerator, self._facts = task, plan, folder, accelerator, facts
        self.name = type(task).__name__  # sharding gives it another
        self.checkpoints = Checkpoints(folder, plan.keep_checkpoints)
        self.saved = 0
        self.seen: list[list[int]] = []
        self.exported: list[Path] = []
        self.averaged: Task | None = None
        self._optimizer_state: dict[str, dict] | None = None
        self._scaler_state: dict | None = None

    def resume(self) -> int:
        """Loads what the folder has -> the number of steps done.

        Raises:
            WuerstchenError: no checkpoint in the folder can be read, or it is one of another task.
        """
        together(self.accelerator, self._tidy)
        state = self._read()
        self.saved = 0 if state is None else state["step"]
        steps = self.accelerator.gather(torch.tensor([self.saved], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise WuerstchenError(
                f"{self.folder}: not all processes see the same checkpoint: it must be on a shared disk"
            )
        if state is not None:
            _load(self.task, state["weights"])
            self.seen = state["seen"]
            self._optimizer_state, self._scaler_state = state["optimizer"], state["scaler"]
        self.task.to(self.accelerator.device)
        self.task.train()
        if self.accelerator.is_main_process:
            self.averaged = averaging_copy(self.task)
            if state is not None:
                _load(self.averaged, state["averaged"])
                record.tell_changes(self.folder, state["step"], state["run"], self.facts)
        return self.saved

    def prepare(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model to call and its optimizer, as accelerate wraps them."""
        if self.accelerator.num_processes > 1 and self.accelerator.device.type != "cpu":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.task)  # torch has none for the CPU
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            shard_blocks(self.task, plugin)
        self._names, optimizer = optimizer_for(self.task, self.plan, self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        if plugin is not None:  # accelerate takes the weights of which a process has nothing for one another
            parameters, names = dict(self.task.named_parameters()), iter(self._names)
            for group in self.optimizer.param_groups:
                group["params"] = [parameters[name] for _, name in zip(group["params"], names, strict=False)]
        if self._optimizer_state is not None:
            self._load_optimizer(self._optimizer_state)
        if self._scaler_state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)
        self._optimizer_state = self._scaler_state = None
        return self.model, self.optimizer

    def count(self, pictures: int) -> None:
        """One more batch was given, of `pictures` in all processes together."""
        if not self.seen or self.seen[-1][1] != pictures:
            self.seen.append([0, pictures])
        self.seen[-1][0] += 1

    def average(self, decay: float) -> None:
        """Updates the averaged weights: decay * average + (1 - decay) * weights."""
        weights = self._weights()
        if self.averaged is not None:
            move_average(self.averaged, weights, decay)

    def shown(self, step: int) -> Task | None:
        """What is exported and drawn with at a step, on the main process alone; all processes must call it.

        It is the averaged copy, and before the first average one with the present weights.
        """
        if step >= self.plan.ema_every:
            return self.averaged
        weights = self._weights()
        if self.averaged is None:
            return None
        present = averaging_copy(self.averaged)
        move_average(present, weights, 0.0)
        return present

    def save(self, step: int, dtype: torch.dtype, monitor) -> None:
        """Writes the checkpoint and the loadable files, each whole or not at all.

        Raises:
            WuerstchenError, in all processes: the state is not finite, or a file could not be written. What was saved
                before is as it was.
        """
        if not self._is_finite():
            raise self.failure(step, "its weights, their average or the optimizer's state are not finite")
        weights, optimizer, shown = self._weights(), self._optimizer(), self.shown(step)
        scaler = self.accelerator.scaler

        def write() -> None:
            assert self.averaged is not None  # on the main process
            state = {
                "task": self.name,
                "step": step,
                "seen": self.seen,
                "weights": weights,
                "averaged": {name: tensor.detach() for name, tensor in self.averaged.learned().items()},
                "optimizer": optimizer,
                "scaler": None if scaler is None else scaler.state_dict(),
                "run": self.facts,
            }
            with self.told(self.folder / "logs"):
                monitor.flush()
            with self.told(self.checkpoints.last):
                self.checkpoints.write(state)
            self.saved = step
            self._export(shown, dtype)

        together(self.accelerator, write)
        self.saved = step

    def export(self, step: int, dtype: torch.dtype) -> None:
        """Writes the weights of the last step as the loaders take them."""
        shown = self.shown(step)
        together(self.accelerator, lambda: self._export(shown, dtype))

    def _export(self, shown: Task | None, dtype: torch.dtype) -> None:
        assert shown is not None  # on the main process
        with self.told(self.folder):
            self.exported = shown.export(self.folder, dtype)

    def failure(self, step: int, what: str, suspect: bool = False) -> WuerstchenError:
        """The error that ends the run when a step, counted from 1, goes wrong; all processes must call it.

        `suspect`: the weights that it began with may be the cause. If they are the last checkpoint, it is no good, and
        the one before takes its place.
        """
        known = self.saved
        suspect = suspect and known > 0 and known == step - 1
        if suspect:
            self.saved = together(self.accelerator, lambda: self.checkpoints.retreat(self._check)) or known
        kept = self.remains("the last good state is in")
        if self.saved != known:
            kept = f"the checkpoint of step {known}, which led to this, is now {self.checkpoints.bad.name}; {kept}"
        elif suspect:
            kept = f"{self.checkpoints.last}, of step {known}, led to this, and there is no good one before it"
        return WuerstchenError(
            f"step {step} went wrong: {what}. Try a lower learning rate than {self.plan.learning_rate:g}, a longer "
            f"warm-up than {self.plan.warm_up}, or another precision; {kept}"
        )

    def remains(self, what: str = "the last state saved is in") -> str:
        """What there is to go on from, for the end of a message."""
        if not self.saved:
            return "nothing was saved yet"
        if not self.checkpoints.last.exists():
            return f"{self.checkpoints.last} is gone"
        return f"{what} {self.checkpoints.last}, of step {self.saved}"

    @contextmanager
    def told(self, path: Path) -> Iterator[None]:
        """What goes wrong when writing to `path` becomes a WuerstchenError that says what is saved."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            if not self.saved:
                kept = "there is no checkpoint yet"
            elif self.checkpoints.last.exists():
                kept = (
                    f"the checkpoint of step {self.saved} is intact. Make room, and the same command goes on from there"
                )
            else:
                kept = f"the checkpoint of step {self.saved} is gone: was the folder removed?"
            raise WuerstchenError(
                f"{getattr(error, 'filename', None) or path}: could not be written ({reason}); {kept}"
            ) from error

    def _is_finite(self) -> bool:
        """Whether all is finite that a checkpoint keeps; one synchronisation with the device."""
        tensors = [
            *self.task.learned().values(),
            *(kept[name] for kept in self.optimizer.state.values() for name in MOMENTS[self.plan.optimizer]),
        ]
        if self.averaged is not None:
            tensors += self.averaged.learned().values()
        finite = all_finite(tensors)
        return self.accelerator.reduce(finite.float(), "mean").item() == 1

    def _tidy(self) -> None:
        try:
            remove_partials(self.folder)
        except OSError as error:
            raise WuerstchenError(f"{self.folder}: the run can't be kept there ({error.strerror})") from error
        self.facts = {
            "seed": self.plan.seed,
            "accumulate": self.plan.accumulate,
            "processes": self.accelerator.num_processes,
            "optimizer": self.plan.optimizer,
            **self._facts(),
        }
        self.checkpoints.recover(self._check)

    def _read(self) -> dict | None:
        if not self.checkpoints.last.exists():
            return None
        try:
            return self.checkpoints.read()
        except Damaged as error:
            raise WuerstchenError(f"{self.checkpoints.last}: can't be read by all processes ({error})") from error

    def _check(self, state: dict) -> None:
        """Raises Damaged if a state is not whole, and WuerstchenError if it is another task's."""
        for key, type_ in KEYS.items():
            if not isinstance(state, dict) or key not in state or not isinstance(state[key], type_):
                raise Damaged(f"it lacks {key!r}")
        if state["task"] != self.name:
            raise WuerstchenError(
                f"{self.checkpoints.last}: the checkpoint of a {state['task'][:80]}, not of a {self.name}: train in "
                "another folder"
            )
        optimizer = state["run"].get("optimizer", self.plan.optimizer)
        if optimizer != self.plan.optimizer:
            raise WuerstchenError(
                f"{self.checkpoints.last}: it holds the state of the optimizer {optimizer!s:.20}, not of "
                f"{self.plan.optimizer}: go on with --optimizer {optimizer!s:.20}, or train in another folder"
            )
        learned = self.task.learned()
        for name, here, there in differing(learned, state["weights"]):
            raise WuerstchenError(
                f"{self.checkpoints.last}: the checkpoint of another configuration: {name[:80]} is {there} there and "
                f"{here} here. Train with the configuration that it had, or in another folder"
            )
        for name, _, there in differing(learned, state["averaged"]):
            raise Damaged(f"the average of {name[:80]} is {there}")
        trained = {name: tensor for name, tensor in learned.items() if tensor.requires_grad}
        tensors = [*state["weights"].values(), *state["averaged"].values()]
        for name, kept in state["optimizer"].items():
            moments = MOMENTS[self.plan.optimizer]
            expected = {moment: trained[name] for moment in moments} if name in trained else {}
            held = {moment: kept.get(moment) for moment in moments} if isinstance(kept, dict) else {}
            if not held or "step" not in kept or any(differing(expected, held)):
                raise Damaged(f"its optimizer's state of {name[:80]} has other shapes")
            tensors += held.values()
        if state["step"] < 0 or not all_finite(tensors):
            raise Damaged("not all of it is finite")

    @property
    def _is_sharded(self) -> bool:
        return any(hasattr(parameter, "full_tensor") for parameter in self.task.parameters())

    def _weights(self) -> dict[str, Tensor]:
        """Name -> what is learned, whole; of a sharded model it is gathered, on the main process alone."""
        learned = {name: tensor.detach() for name, tensor in self.task.learned().items()}
        return gathered(learned, self.accelerator.is_main_process) if self._is_sharded else learned

    def _optimizer(self) -> dict[str, dict]:
        """Name of a parameter -> what the optimizer keeps of it, whole."""
        kept = self.optimizer.state_dict()["state"]
        states = {self._names[index]: values for index, values in kept.items()}
        if not self._is_sharded:
            return states
        is_main = self.accelerator.is_main_process
        whole = {name: gathered(values, is_main) for name, values in states.items()}
        return whole if is_main else {}

    def _load_optimizer(self, states: dict[str, dict]) -> None:
        indices = {name: index for index, name in enumerate(self._names)}
        if self._is_sharded:
            parameters = dict(self.task.named_parameters())
            states = {name: sharded(values, parameters[name]) for name, values in states.items()}
        state = {indices[name]: values for name, values in states.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def together(accelerator, work: Callable[[], Any]) -> Any:
    """The main process does the work, the others wait for it, and all get its result or its WuerstchenError."""
    from accelerate.utils import broadcast_object_list

    result, told = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except WuerstchenError as error:
            if accelerator.num_processes == 1:
                raise
            told = str(error)
    result, told = broadcast_object_list([result, told])
    if told is not None:
        raise WuerstchenError(told)
    return result


@torch.no_grad()
def _load(task: Task, weights: dict[str, Tensor]) -> None:
    for name, tensor in task.learned().items():
        tensor.copy_(weights[name])
