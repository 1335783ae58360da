"""What the nodes' tests give to them."""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
LARGEST_SEED = 2**64 - 1
QUICK_C = {"seed": 3, "steps": 3, "cfg": 1.0, "sampler": "ddpm", "schedule": "even", "denoise": 1.0}
QUICK_B = {"seed": 3, "steps": 2, "cfg": 1.0, "sampler": "ddpm"}


def picture(height, width, batch=1, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(5))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
