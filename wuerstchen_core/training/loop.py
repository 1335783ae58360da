"""The training loop: AdamW, warm-up, EMA, and checkpoints from which a run goes on as if it had never stopped.

What a step sees follows from its number alone (both random generators are seeded with it), so a checkpoint needs no
random states and no position in the data.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..atomic import replacing
from ..errors import WuerstchenError


@dataclass(frozen=True)
class Plan:
    """How long and how fast a network learns."""

    steps: int
    batch: int
    learning_rate: float
    warm_up: int = 200  # steps
    cool_down: float = 0.25  # share of the steps, the last ones, in which the learning rate falls to zero
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    ema_every: int = 10  # steps
    ema_decay: float = 0.98
    save_every: int = 200  # steps
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step: up, level, down to zero."""
        cooling = (self.steps - step) / max(1, self.cool_down * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up, cooling)


def train(network: nn.Module, loss: Callable[[random.Random], Tensor], plan: Plan, checkpoint: str | Path) -> None:
    """Train `network` in place to the end of the plan and leave it with its averaged weights, in eval mode.

    `loss(generator)` draws one batch with the generator (and torch's own) and gives its loss. The run saves itself to
    `checkpoint` every so often, and goes on from there if the file exists.

    Raises:
        WuerstchenError: the loss is no number any more, or the checkpoint belongs to another network.
    """
    checkpoint = Path(checkpoint)
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    ema = {name: value.clone() for name, value in network.state_dict().items()}
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        try:
            network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise WuerstchenError(f"{checkpoint} belongs to another network: remove it, or train elsewhere") from error
        optimizer.load_state_dict(state["optimizer"])
        ema, first = state["ema"], state["step"]

    network.train()
    bar = tqdm(range(first, plan.steps), initial=first, total=plan.steps, desc=checkpoint.stem, smoothing=0.05)
    smooth = None
    for step in bar:
        torch.manual_seed(plan.seed << 32 | step)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        value = loss(random.Random(plan.seed << 32 | step))
        if not value.isfinite():
            raise WuerstchenError(
                f"the loss of step {step} is {value.item()}: try a lower learning rate than "
                f"{plan.learning_rate}; the last good state is in {checkpoint}"
            )
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), plan.gradient_norm)
        optimizer.step()

        done = step + 1
        if done % plan.ema_every == 0:
            averaged = done // plan.ema_every
            _average(ema, network, min(plan.ema_decay, averaged / (10 + averaged)))
        if done % plan.save_every == 0 or done == plan.steps:
            state = {"network": network.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "step": done}
            with replacing(checkpoint) as partial:
                torch.save(state, partial)
        smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
    network.load_state_dict(ema)
    network.eval()


@torch.no_grad()
def _average(ema: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)
