"""A step of ComfyUI's KSampler beside one of the core's sampler, on the same network.

    COMFYUI_DIR=... python -m tests.comfyui.benchmark [--side PIXELS] [--steps N] [--runs N] [--depth N] [--only STAGE]

The networks have the released sizes and random weights; --depth takes fewer of their blocks. Both sides run in turn in
one process; what is printed is the median time of a step after the first, in which the text is read, and the median of
the ratios of runs that followed each other: of the time that passed, and of that which the process computed, which
other processes disturb less. --only measures one of the two networks.
"""

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch

Run = Callable[[Callable[[], None]], None]  # samples, and calls what it is given after every step
Seconds = tuple[float, float]  # that passed, and that the process computed
Pair = tuple[Seconds, Seconds]  # KSampler's, and the core's


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.comfyui.benchmark")
    parser.add_argument("--side", type=int, default=512, metavar="PIXELS", help="of the picture (default: 512)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps of a run (default: 5)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs of each side (default: 3)")
    parser.add_argument("--depth", type=int, metavar="N", help="blocks of Stage C, and most of a level of Stage B")
    parser.add_argument("--only", choices=("stage_c", "stage_b"), help="measure only this network")
    options = parser.parse_args()
    if "COMFYUI_DIR" not in os.environ:
        parser.error("set COMFYUI_DIR to ComfyUI's folder")
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    importlib.import_module("comfy.options").enable_args_parsing()
    models = pack_module("nodes.host.models")
    for kind, sides in {"stage_c": stage_c, "stage_b": stage_b}.items():
        if options.only not in (None, kind):
            continue
        models.load_network = random_network(options.depth)  # in the place of one from a file
        model = models.load_diffusion(kind, None)
        pairs: list[Pair] = []
        for _ in range(options.runs):
            host_run, core_run = sides(model, options.side, options.steps)
            pairs.append((median_step(host_run), median_step(core_run)))
        (host, core), (passed, computed) = medians(pairs), ratios(pairs)
        depth = "" if options.depth is None else f", depth {options.depth}"
        print(f"{kind}{depth}, {options.side}x{options.side}: KSampler {host:.3f} s, core {core:.3f} s a step, ratio "
              f"{passed:.3f}, of the time computed {computed:.3f}", flush=True)  # fmt: skip


def pack_module(name: str):
    """A module of the pack, loaded as ComfyUI loads it."""
    from tests.conftest import load_pack

    load_pack("comfyui-wuerstchen")
    return importlib.import_module(f"comfyui-wuerstchen.{name}")


def random_network(depth: int | None):
    """What builds a network of the pack's in the released size."""
    loaded = pack_module("wuerstchen_core.reports.against_diffusers")
    config_c = pack_module("wuerstchen_core.models.stage_c").StageCConfig()
    config_b = pack_module("wuerstchen_core.models.stage_b").StageBConfig()
    if depth is not None:
        config_c = replace(config_c, depth=depth)
        config_b = replace(config_b, blocks=tuple(min(depth, count) for count in config_b.blocks))

    def build(kind, path, device, dtype, network, operations):
        with torch.device("meta"):
            outline = network(config_c if kind == "stage_c" else config_b, operations)
        network = loaded.filled(outline, dtype, device)
        (network.out if kind == "stage_c" else network.clf)[1].weight.mul_(0.1)  # finite, as a trained one's noise
        return network

    return build


def stage_c(model, side: int, steps: int) -> tuple[Run, Run]:
    """With guidance, as it is sampled."""
    Geometry = pack_module("wuerstchen_core.geometry").Geometry
    sample_stage_c = pack_module("wuerstchen_core.pipeline").sample_stage_c

    network = model.model.diffusion_model
    latent = torch.zeros(1, 16, *Geometry(side, side).stage_c)
    text, negative = torch.randn(2, 1, 77, network.config.text_width)

    def core(done):
        sample_stage_c(
            network, latent, text, negative, steps=steps, cfg=4.0, sampler="ddpm", progress=lambda *_: done()
        )

    return ksampler(model, latent, [[text, {}]], [[negative, {}]], steps, cfg=4.0), core


def stage_b(model, side: int, steps: int) -> tuple[Run, Run]:
    """Without guidance, as it is sampled."""
    Geometry = pack_module("wuerstchen_core.geometry").Geometry
    sample_stage_b = pack_module("wuerstchen_core.pipeline").sample_stage_b
    conditioned, pack = pack_module("nodes.stage_b").conditioned, pack_module("nodes.latents").pack
    geometry = Geometry(side, side)
    semantic = torch.randn(1, 16, *geometry.stage_c)
    positive, negative, empty = conditioned(pack(semantic, geometry), None, None, "benchmark")

    def core(done):
        network = model.model.diffusion_model
        sample_stage_b(network, semantic, geometry, steps=steps, cfg=1.0, sampler="ddpm", progress=lambda *_: done())

    return ksampler(model, empty["samples"], positive, negative, steps, cfg=1.0), core


def ksampler(model, latent, positive, negative, steps: int, cfg: float) -> Run:
    from comfy.sample import sample

    def run(done):
        with torch.inference_mode():
            sample(
                model, torch.randn_like(latent), steps, cfg, "ddpm", "simple", positive, negative, latent,
                callback=lambda *_: done(), disable_pbar=True,
            )  # fmt: skip

    return run


def median_step(run: Run) -> Seconds:
    """Seconds of a run's median step after the first: those that passed, and those that the process computed."""
    ends: list[Seconds] = []
    run(lambda: ends.append((time.perf_counter(), time.process_time())))
    steps = [(later[0] - one[0], later[1] - one[1]) for one, later in pairwise(ends)]
    passed, computed = (statistics.median(seconds) for seconds in zip(*steps, strict=True))
    return passed, computed


def medians(pairs: list[Pair]) -> tuple[float, float]:
    """Seconds of a step that passed: of KSampler and of the core."""
    host, core = (statistics.median(side[0] for side in sides) for sides in zip(*pairs, strict=True))
    return host, core


def ratios(pairs: list[Pair]) -> tuple[float, float]:
    """KSampler's seconds over the core's in the median pair of runs: of those that passed and those computed."""
    passed, computed = (statistics.median(host[clock] / core[clock] for host, core in pairs) for clock in (0, 1))
    return passed, computed


if __name__ == "__main__":
    main()
