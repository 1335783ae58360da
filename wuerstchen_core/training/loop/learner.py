"""An update of the weights from one step's batches, and what came out of it."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..data.feature_cache import FeatureCache
from .draws import Draws
from .plan import Plan
from .state import RunState
from .task import Task
from .weights import unsharded

OVERFLOWS = 100  # consecutive steps whose float16 gradients may overflow, until their scale is found


@dataclass
class Learner:
    """Updates the weights, a step at a time, on a process's share of the pictures."""

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
