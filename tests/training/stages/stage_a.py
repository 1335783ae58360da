"""A small task of Stage A, and pictures for it."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from wuerstchen_core.models.stage_a import StageAConfig
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.loop.draws import Draws
from wuerstchen_core.training.stages.stage_a import Options, build

TINY = Options(
    network=StageAConfig(widths=(8, 16), bottleneck_blocks=1, codebook_size=24, scale_factor=0.5),
    crop=24,
    discriminator_width=4,
    discriminator_layers=2,
)


DATA = DataOptions(data="pictures", size=64, batch=3, workers=0, buckets=False)


def tiny(data=DATA, **changes):
    """A task with random gates, as after some training, whose encoder is told from its decoder by both losses."""
    torch.manual_seed(0)
    task = build(dataclasses.replace(TINY, **changes), data)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if name.endswith("gammas"):
                parameter.normal_(std=0.5)
    return task


def pictures(count=3, height=32, width=40, seed=1):
    """Smooth ones, so that reconstruction is something to learn."""
    coarse = torch.rand(count, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def batch(**changes):
    return {"image": pictures(**changes)}


def at(step=0, count=3, **places):
    return Draws(0, step, count, **places)


def crops(images, draws, side):
    places = (draws.uniform(2) * torch.tensor([images.shape[2] - side + 1, images.shape[3] - side + 1])).long()
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(images, places.tolist(), strict=True)])


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)


def two_parts(rank, world, folder):
    """What a process of two has: the codebook after a revival, and after steps of DDP; saved to a file."""
    task, latent = tiny(revive_every=2), torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    task.idle[3:] = 2
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    task._revive(latent[part], at(2, 4 // world, rank=rank, world=world))
    task._count(torch.arange(10)[rank::world])
    revived = {"codes": task.vqgan.vquantizer.codebook.weight.detach().clone(), "idle": task.idle.clone()}

    task = tiny(revive_every=2, adversarial_start=3)
    model = nn.parallel.DistributedDataParallel(task, find_unused_parameters=task.leaves_out) if world > 1 else task
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.01)
    images = pictures(4)[part]
    for step in range(5):
        losses = model({"image": images}, at(step, 4 // world, rank=rank, world=world))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    parameters = {name: parameter.detach() for name, parameter in task.named_parameters()}
    torch.save({"revived": revived, "parameters": parameters}, Path(folder) / f"{rank}.pt")


def one_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    two_parts(rank, 2, folder)
    dist.destroy_process_group()
