"""What a run is made of at a step, on disk and in memory: weights, their average, the optimizer."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...util.atomic import replacing
from ...util.errors import WuerstchenError
from .task import Task


class RunState:
    """The state of a run and the folder that keeps it.

    `averaged`, on the main process alone, is a copy of the task with the averaged weights. `saved` is the last step
    that the checkpoint has.
    """

    def __init__(self, task: Task, plan, folder: Path, accelerator):
        self.task, self.plan, self.folder, self.accelerator = task, plan, folder, accelerator
        self.name = type(task).__name__  # sharding gives it another
        self.checkpoint = folder / "checkpoint.pt"
        self.saved = 0
        self.exported: list[Path] = []
        self.averaged: Task | None = None
        self._optimizer_state: dict[str, dict] | None = None
        self._scaler_state: dict | None = None

    def resume(self) -> int:
        """Takes up what the folder has -> the number of steps done.

        Raises:
            WuerstchenError: the folder can't be made, or its checkpoint is damaged or of another task.
        """
        together(self.accelerator, self._make_folder)
        state = self._read() if self.checkpoint.exists() else None
        self.saved = 0 if state is None else state["step"]
        steps = self.accelerator.gather(torch.tensor([self.saved], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise WuerstchenError(
                f"{self.folder}: not all processes see the same checkpoint: it must be on a shared disk"
            )
        if state is not None:
            _load(self.task, state["weights"], self.checkpoint)
            self._optimizer_state, self._scaler_state = state["optimizer"], state["scaler"]
        self.task.to(self.accelerator.device)
        self.task.train()
        if self.accelerator.is_main_process:
            self.averaged = averaging_copy(self.task)
            if state is not None:
                _load(self.averaged, state["averaged"], self.checkpoint)
        return self.saved

    def prepare(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model to call and its optimizer, as accelerate wraps them."""
        self._names = [name for name, parameter in self.task.named_parameters() if parameter.requires_grad]
        trained = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.plan.learning_rate, weight_decay=self.plan.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        if self._optimizer_state is not None:
            self._load_optimizer(self._optimizer_state)
        if self._scaler_state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)
        self._optimizer_state = self._scaler_state = None
        return self.model, self.optimizer

    def average(self, decay: float) -> None:
        """The averaged weights move towards the present ones, by a share of 1 - decay."""
        weights = self._weights()
        if self.averaged is not None:
            move_average(self.averaged, weights, decay)

    def save(self, step: int, dtype: torch.dtype, monitor) -> None:
        """Writes the checkpoint and the loadable files, each whole or not at all.

        Raises:
            WuerstchenError, in all processes: a file could not be written. The earlier one is as it was.
        """
        weights, optimizer = self._weights(), self._optimizer()
        scaler = self.accelerator.scaler
        together(self.accelerator, lambda: self._write(step, weights, optimizer, scaler, dtype, monitor))
        self.saved = step

    def export(self, dtype: torch.dtype) -> None:
        """Writes the averaged weights as the loaders take them."""
        with self.told(self.folder):
            self.exported = self.averaged.export(self.folder, dtype)

    def _write(self, step, weights, optimizer, scaler, dtype, monitor) -> None:
        state = {
            "task": self.name,
            "step": step,
            "weights": weights,
            "averaged": {name: tensor.detach() for name, tensor in self.averaged.learned().items()},
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        with self.told(self.folder / "logs"):
            monitor.flush()
        with self.told(self.checkpoint), replacing(self.checkpoint) as partial:
            torch.save(state, partial)
        self.saved = step
        self.export(dtype)

    @contextmanager
    def told(self, path: Path) -> Iterator[None]:
        """What goes wrong when writing to `path` becomes a WuerstchenError that says what is saved."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            kept = f"the checkpoint of step {self.saved} is intact" if self.saved else "there is no checkpoint yet"
            raise WuerstchenError(
                f"{getattr(error, 'filename', None) or path}: could not be written ({reason}); {kept}. Make room, and "
                "the same command goes on from there"
            ) from error

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*.partial"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
        except OSError as error:
            raise WuerstchenError(f"{self.folder}: the run can't be kept there ({error.strerror})") from error

    def _read(self) -> dict:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
            task = state["task"]
        except Exception as error:  # a damaged file raises nearly anything
            raise WuerstchenError(f"{self.checkpoint}: not a checkpoint that can be read ({error})") from error
        if task != self.name:
            raise WuerstchenError(
                f"{self.checkpoint}: the checkpoint of a {task}, not of a {self.name}: train in another folder"
            )
        return state

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


def together(accelerator, work: Callable[[], None]) -> None:
    """The main process does the work, and the others wait for it. Its WuerstchenError is raised in all of them."""
    from accelerate.utils import broadcast_object_list

    told: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            work()
        except WuerstchenError as error:
            if accelerator.num_processes == 1:
                raise
            told = [str(error)]
    broadcast_object_list(told)
    if told[0] is not None:
        raise WuerstchenError(told[0])


def averaging_copy(task: Task) -> Task:
    """A copy in eval mode that shares with the task what is not learned."""
    shared = [*task.frozen, *(parameter for parameter in task.parameters() if not parameter.requires_grad)]
    copied = copy.deepcopy(task, {id(one): one for one in shared})
    return copied.eval()


@torch.no_grad()
def move_average(averaged: Task, weights: dict[str, Tensor], decay: float) -> None:
    for name, value in averaged.learned().items():
        now = weights[name].to(value.device)
        if value.is_floating_point():
            value.lerp_(now, 1 - decay)
        else:
            value.copy_(now)


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; then all processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors: dict[str, Tensor], is_main: bool) -> dict[str, Tensor]:
    """Shards -> whole tensors on the CPU, on the main process alone; all processes must call it."""
    whole = {}
    for name, tensor in tensors.items():
        full = unsharded(tensor)
        if is_main:
            whole[name] = full.cpu() if isinstance(full, Tensor) else full
    return whole


def sharded(values: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Whole tensors -> this process's shards of them, laid out as the parameter is; numbers stay as they are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return values
    return {
        name: distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        if isinstance(value, Tensor) and value.shape == like.shape
        else value
        for name, value in values.items()
    }


@torch.no_grad()
def _load(task: Task, weights: dict[str, Tensor], checkpoint: Path) -> None:
    learned = task.learned()
    for name in [*learned, *weights]:
        here, there = (list(held[name].shape) if name in held else "missing" for held in (learned, weights))
        if here != there:
            raise WuerstchenError(
                f"{checkpoint}: the checkpoint of another configuration: {name} is {there} there and {here} here. "
                "Train with the configuration that it had, or in another folder"
            )
    for name, tensor in learned.items():
        tensor.copy_(weights[name])
