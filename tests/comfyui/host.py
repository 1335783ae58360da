"""What the tests in a real ComfyUI share."""

from types import SimpleNamespace

import torch

from tests.reference import distance

CALLED: set[str] = set()  # ComfyUI's own nodes that a run went through


def noise(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height, width, batch=1, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(5))


def apart(one, other):
    """The distance of two LATENTs' samples."""
    return distance(one["samples"], other["samples"])


def load_set(run, name, weight_dtype="default"):
    """A whole set on ComfyUI's sockets."""
    names = ("model_c", "clip_c", "model_b", "clip_b", "stage_a", "semantic")
    return SimpleNamespace(
        **dict(zip(names, run("WuerstchenLoadModel", model=name, weight_dtype=weight_dtype), strict=True))
    )
