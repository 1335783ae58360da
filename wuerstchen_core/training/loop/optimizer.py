"""The optimizer of a run: AdamW (arXiv 1711.05101), or the same with a state of eight bits (arXiv 2110.02861)."""

import torch

from ...models.blocks import GlobalResponseNorm
from ...util.errors import WuerstchenError, readable
from .task import Task

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adamw8bit": ("state1", "state2")}  # what each keeps of a parameter
FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which torch updates all weights in one go


def optimizer_for(task: Task, plan, device: torch.device) -> tuple[list[str], torch.optim.Optimizer]:
    """The names of what is trained, in the optimizer's order, and the optimizer.

    The weights of Linears and convolutions decay, biases and gains don't, unless `plan.decay_all`. Each group has its
    "rate", the factor of the learning rate that the task gives.

    Raises WuerstchenError if the optimizer can't be had here.
    """
    trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    gains = {
        id(gain) for module in task.modules() if isinstance(module, GlobalResponseNorm) for gain in module.parameters()
    }
    groups: dict[tuple[float, float], list[str]] = {}
    for name, parameter in trained.items():
        decays = plan.decay_all or (parameter.ndim > 1 and id(parameter) not in gains)
        groups.setdefault((task.rate(name), plan.weight_decay if decays else 0.0), []).append(name)
    ordered = sorted(groups.items(), reverse=True)
    names = [name for _, members in ordered for name in members]
    parameters = [
        {"params": [trained[name] for name in members], "rate": rate, "weight_decay": decay}
        for (rate, decay), members in ordered
    ]
    options = {"lr": plan.learning_rate, "betas": (plan.beta1, plan.beta2)}
    if plan.optimizer == "adamw":
        return names, torch.optim.AdamW(parameters, fused=device.type in FUSED, **options)
    return names, _eight_bits(device)(parameters, **options)


def _eight_bits(device: torch.device) -> type[torch.optim.Optimizer]:
    if device.type == "cpu":
        raise WuerstchenError("optimizer adamw8bit needs a GPU: take --optimizer adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # where it does not fit the GPU's driver it raises nearly anything
        raise WuerstchenError(
            f"optimizer adamw8bit needs bitsandbytes, which can't be imported ({readable(error, 150)}): "
            "pip install bitsandbytes, or take --optimizer adamw"
        ) from error
    return AdamW8bit
