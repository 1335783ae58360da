"""A step of ComfyUI's KSampler beside one of the core's sampler, on the same network.

    COMFYUI_DIR=... python -m tests.comfyui.benchmark [--side PIXELS] [--steps N] [--runs N]

The networks have the released sizes and random weights. Both sides run in turn in one process; what is printed is the
median time of a step after the first, in which the text is read, and the ratio of the two.
"""

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[Callable[[], None]], None]  # samples, and calls what it is given after every step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.comfyui.benchmark")
    parser.add_argument("--side", type=int, default=512, metavar="PIXELS", help="of the picture (default: 512)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps of a run (default: 5)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs of each side (default: 3)")
    options = parser.parse_args()
    if "COMFYUI_DIR" not in os.environ:
        parser.error("set COMFYUI_DIR to ComfyUI's folder")
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    importlib.import_module("comfy.options").enable_args_parsing()
    load_diffusion = pack_module("nodes.host.models").load_diffusion
    for kind, sides in (("stage_c", stage_c), ("stage_b", stage_b)):
        with tempfile.TemporaryDirectory() as folder:
            model = load_diffusion(kind, random_weights(kind, Path(folder)))
        times: dict[str, list[float]] = {"KSampler": [], "core": []}
        for _ in range(options.runs):
            for name, run in zip(times, sides(model, options.side, options.steps), strict=True):
                times[name] += step_times(run)
        host, core = (statistics.median(seconds) for seconds in times.values())
        print(f"{kind}, {options.side}x{options.side}: KSampler {host:.3f} s, core {core:.3f} s a step, "
              f"ratio {host / core:.3f}", flush=True)  # fmt: skip


def pack_module(name: str):
    """A module of the pack, loaded as ComfyUI loads it."""
    from tests.conftest import load_pack

    load_pack("comfyui-wuerstchen")
    return importlib.import_module(f"comfyui-wuerstchen.{name}")


def random_weights(kind: str, folder: Path) -> Path:
    import wuerstchen_core as w
    from tests.reference import fill_zeros
    from wuerstchen_core.models.stage_b import DiffNeXt
    from wuerstchen_core.models.stage_c import Prior

    path = folder / f"{kind}.safetensors"
    w.save(fill_zeros(Prior() if kind == "stage_c" else DiffNeXt()), path)
    return path


def stage_c(model, side: int, steps: int) -> tuple[Run, Run]:
    """With guidance, as it is sampled."""
    from wuerstchen_core import Geometry
    from wuerstchen_core.pipeline import sample_stage_c

    network = model.model.diffusion_model
    latent = torch.zeros(1, 16, *Geometry(side, side).stage_c)
    text, negative = torch.randn(2, 1, 77, network.config.text_width)

    def core(done):
        sample_stage_c(network, latent, text, negative, steps=steps, cfg=4.0, progress=lambda *_: done())

    return ksampler(model, latent, [[text, {}]], [[negative, {}]], steps, cfg=4.0), core


def stage_b(model, side: int, steps: int) -> tuple[Run, Run]:
    """Without guidance, as it is sampled."""
    from wuerstchen_core import Geometry
    from wuerstchen_core.pipeline import sample_stage_b

    conditioned, pack = pack_module("nodes.stage_b").conditioned, pack_module("nodes.latents").pack
    geometry = Geometry(side, side)
    semantic = torch.randn(1, 16, *geometry.stage_c)
    positive, negative, empty = conditioned(pack(semantic, geometry), None, None, "benchmark")

    def core(done):
        network = model.model.diffusion_model
        sample_stage_b(network, semantic, geometry, steps=steps, progress=lambda *_: done())

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


def step_times(run: Run) -> list[float]:
    """Seconds between the ends of a run's steps."""
    ends: list[float] = []
    run(lambda: ends.append(time.perf_counter()))
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]


if __name__ == "__main__":
    main()
