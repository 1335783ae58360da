"""The task that a stage's training consists of.

A stage's module has a frozen dataclass `Options` (see `options`) and `build(options, data) -> Task`, where `data` is
the run's `DataOptions`. `command.STAGES` names the module. torch's random state is seeded before `build`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoints.load import save
from .draws import Draws


class Task(nn.Module):
    """The networks that are trained, as submodules, and their losses: one forward and backward pass per micro-batch.

    `frozen` are networks that are only used: they are not among the parameters and the state, but `to` moves them.
    Parameters that need no gradient are neither averaged nor kept in checkpoints. The averaged weights are a copy of
    the task in eval mode that shares both with it.
    """

    frozen: tuple[nn.Module, ...] = ()
    feature_files: tuple[Path, ...] = ()  # of the networks that make `features`; without, there is nothing to cache
    feature_key: str = ""  # what else `features` depend on: a cache keeps those of another key apart
    features_of_captions: bool = True  # whether `features` depend on captions
    reads_captions: bool = False
    leaves_out: bool = False  # whether there are steps that leave parameters without a gradient

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """Losses by name, means over the batch, whose sum is minimised.

        `batch` is what `data.open_batches` gives, pictures on the device, with "features": what `features` gave.
        """
        raise NotImplementedError

    def features(self, batch: dict) -> dict[str, Tensor]:
        """What the frozen networks make of a batch's "image" (B, 3, H, W) and "caption": (B, …) each.

        Called without gradients. Training sees them rounded to float16, as a cache keeps them, and where a cache has
        them there is no "image" in the batch.
        """
        return {}

    def rate(self, name: str) -> float:
        """The factor of the learning rate for the parameter of this name."""
        return 1.0

    def exported(self) -> dict[str, nn.Module]:
        """File name without its ending -> the network to write to it."""
        raise NotImplementedError

    def export(self, folder: Path, dtype: torch.dtype) -> list[Path]:
        """Writes what the loaders take, each file whole or not at all; called on the averaged copy."""
        paths = []
        for name, network in self.exported().items():
            paths.append(folder / f"{name}.safetensors")
            save(network, paths[-1], dtype)
        return paths

    def samples(self) -> Tensor | None:
        """(N, H, W, 3) in [0, 1] of the same prompts or pictures and seeds each time; called on the averaged copy."""
        return None

    def to(self, *args, **kwargs) -> "Task":
        for network in self.frozen:
            network.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def learned(self) -> dict[str, Tensor]:
        """Trained parameters and all buffers by name: what checkpoints and averages hold."""
        return {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if _is_learned(tensor)}


def _is_learned(tensor: Tensor) -> bool:
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)
