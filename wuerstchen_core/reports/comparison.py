"""Würstchen beside diffusers in figures: measured, as a table, as JSON and as a plot."""

import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..diffusion.options import STAGE_B, STAGE_C
from ..pipeline import Wuerstchen
from ..util.errors import WuerstchenError
from .against_diffusers import DIFFUSERS, OURS, SIDES, Stage, Task, stages
from .diffusers_networks import require_diffusers
from .memory import peak_growth
from .timing import matmul_rate, time_in_turn

Figures = dict[str, Any]  # what is written as JSON


def compare(
    networks: Wuerstchen,
    name: str,
    task: Task,
    runs: int = 3,
    timed_steps: int | None = 3,
    tell: Callable[[str], None] = lambda line: None,
) -> Figures:
    """Times every stage on both sides, `runs` runs of each in turn.

    Args:
        networks: on the meta device, for their sizes; `name` is what the table calls them.
        timed_steps: of a run; the rest of a picture is extrapolated. None: all.
        tell: is called with what is being measured.

    Returns:
        Times in seconds, memory in bytes (None where it can't be measured), `gemm` in operations a second. "total_s" is
        of a run of "timed_steps", "seconds" of one of "steps".
    """
    version = require_diffusers()
    gemm, measured = 0.0, []
    for stage in stages(networks, task):
        tell(f"{stage.name}, batch {stage.batch}")
        gemm = max(gemm, matmul_rate(task.dtype, task.device))
        measured.append(_measure(stage, task, runs, timed_steps))
        del stage  # with its networks, before the next one's are built
    batches = [_picture(batch, [one for one in measured if one["batch"] == batch], gemm) for batch in task.batches]
    return {
        "networks": name,
        "width": task.geometry.width,
        "height": task.geometry.height,
        "dtype": str(task.dtype).removeprefix("torch."),
        "device": _device_name(task.device),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": version},
        "runs": runs,
        "timed_steps": timed_steps,
        "samplers": {"Stage C": STAGE_C.sampler, "Stage B": STAGE_B.sampler},
        "gemm": gemm,
        "batches": batches,
    }


def _measure(stage: Stage, task: Task, runs: int, timed_steps: int | None) -> Figures:
    def memory(side: str) -> int | None:
        """Of a run of two steps, which warms up what the timed ones use."""
        try:
            return peak_growth(lambda: stage.runs[side](min(2, stage.steps[side]), lambda: None), task.device)[0]
        except WuerstchenError:
            return None

    working = {side: memory(side) for side in stage.runs}
    timed = {side: min(steps, timed_steps or steps) for side, steps in stage.steps.items()}
    timings = time_in_turn(stage.runs, timed, runs, task.device)
    return {
        "stage": stage.name,
        "batch": stage.batch,
        "operations": stage.operations,
        "weights": stage.weights,
        "sides": {
            side: {
                "steps": stage.steps[side],
                "step_s": timing.step,
                "timed_steps": timing.steps,
                "total_s": timing.total,
                "seconds": timing.seconds(stage.steps[side]),
                "working": working[side],
            }
            for side, timing in timings.items()
        },
    }


def _picture(batch: int, measured: list[Figures], gemm: float) -> Figures:
    """A batch's stages, what they come to, and how each compares."""

    def of(side: str) -> Figures:
        parts = [one["sides"].get(side, one["sides"][OURS]) for one in measured]
        working = [part["working"] for part in parts]
        weights = sum(one["weights"] for one in measured)
        return {
            "seconds": sum(part["seconds"] for part in parts),
            "operations": sum(one["operations"] * part["steps"] for one, part in zip(measured, parts, strict=True)),
            "steps": {one["stage"]: part["steps"] for one, part in zip(measured, parts, strict=True)},
            "memory": None if None in working else weights + max(working),
        }

    for one in measured:
        for part in one["sides"].values():
            part["of_gemm"] = one["operations"] / part["step_s"] / gemm
        one["speed"] = one["sides"][DIFFUSERS]["step_s"] / one["sides"][OURS]["step_s"]
    pictures = {side: of(side) for side in SIDES}
    for picture in pictures.values():
        picture["of_gemm"] = picture["operations"] / picture["seconds"] / gemm
        picture["speed"] = pictures[DIFFUSERS]["seconds"] / picture["seconds"]
    return {"batch": batch, "stages": measured, "pictures": pictures}


def table(figures: Figures) -> Iterator[str]:
    """The figures in lines to read."""
    versions, timed = figures["versions"], figures["timed_steps"]
    yield (
        f"Würstchen {figures['networks']} beside diffusers {versions['diffusers']}: {figures['width']}×"
        f"{figures['height']} pixels, {figures['dtype']}, random weights"
    )
    threads = "" if figures["device"].startswith("cuda") else f", threads: {figures['threads']}"
    yield (
        f"{figures['device']}{threads}, torch {versions['torch']}; matrix products (GEMM) reach "
        f"{_rate(figures['gemm'])}"
    )
    how = "all of it measured" if timed is None else f"extrapolated from {timed} steps of each stage"
    yield f"medians of {figures['runs']} runs of each side, in turn; a picture's time is {how}"
    for one in figures["batches"]:
        yield ""
        title = f"batch {one['batch']}"
        yield f"{title:<28}{'diffusers':>12}{'ours':>12}{'':>9}{'of GEMM':>16}{'GiB':>15}"
        for stage in one["stages"]:
            sides = stage["sides"]
            label = stage["stage"] + (", a step" if sides[OURS]["steps"] > 1 else "")
            memory = [_memory(stage["weights"], sides[side]["working"]) for side in (DIFFUSERS, OURS)]
            yield _row(label, sides[DIFFUSERS], sides[OURS], "step_s", stage["speed"], memory)
        pictures = one["pictures"]
        theirs, ours, defaults = (pictures[side] for side in SIDES)
        memory = [_gibibytes(side["memory"]) for side in (theirs, ours)]
        yield _row(f"picture, {_steps(ours)} steps", theirs, ours, "seconds", ours["speed"], memory)
        speed = f"{defaults['speed']:.2f} ×"
        yield f"{f'our defaults, {_steps(defaults)} steps':<28}{'':>12}{_seconds(defaults['seconds']):>12}{speed:>9}"
    yield ""
    yield "steps: of Stage C, with guidance, + of Stage B; GiB: weights, and the most that a run needs beside them"
    yield "of GEMM: the operations that our networks need, over the time, as a share of the rate of matrix products"


def _row(label: str, theirs: Figures, ours: Figures, seconds: str, speed: float, memory: list[str]) -> str:
    shares = [f"{side['of_gemm']:.0%}".replace("%", " %") for side in (theirs, ours)]
    return (
        f"{label:<28}{_seconds(theirs[seconds]):>12}{_seconds(ours[seconds]):>12}{f'{speed:.2f} ×':>9}"
        f"{shares[0]:>9}{shares[1]:>7}{memory[0]:>8}{memory[1]:>7}"
    )


def _steps(picture: Figures) -> str:
    return f"{picture['steps']['Stage C']} + {picture['steps']['Stage B']}"


def _seconds(seconds: float) -> str:
    return (
        f"{seconds * 1000:,.1f} ms" if seconds < 0.1 else f"{seconds:,.2f} s" if seconds < 100 else f"{seconds:,.0f} s"
    )


def _rate(rate: float) -> str:
    return f"{rate / 1e9:,.0f} GFLOP/s" if rate < 1e12 else f"{rate / 1e12:,.1f} TFLOP/s"


def _memory(weights: int, working: int | None) -> str:
    return _gibibytes(None if working is None else weights + working)


def _gibibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def plot(figures: Figures, axes: list[Any]) -> None:
    """Seconds over the batch size, by stage, and seconds a picture (paper, figure 4), on two axes of matplotlib."""
    by_stage, by_picture = axes
    batches = figures["batches"]
    labels = [str(one["batch"]) for one in batches]
    width = 0.8 / len(SIDES)
    hatches = dict(zip(SIDES, ("//", "", ".."), strict=True))
    names = [stage["stage"] for stage in batches[0]["stages"]]
    for number, side in enumerate(SIDES):
        places = [place + (number - 1) * width for place in range(len(batches))]
        bottom = [0.0] * len(batches)
        for index, name in enumerate(names):
            sides = [one["stages"][index]["sides"] for one in batches]
            heights = [of.get(side, of[OURS])["seconds"] for of in sides]
            label = name if side == OURS else None
            by_stage.bar(places, heights, width * 0.92, bottom, color=f"C{index}", hatch=hatches[side], label=label)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        seconds = [one["pictures"][side]["seconds"] / one["batch"] for one in batches]
        by_picture.plot(labels, seconds, marker="o", label=f"{side}, {_steps(batches[0]['pictures'][side])} steps")
    by_stage.set_xticks(range(len(batches)), labels)
    by_stage.set(xlabel="batch size", ylabel="seconds a batch", title="diffusers (//), ours, our defaults (..)")
    by_picture.set(xlabel="batch size", ylabel="seconds a picture", ylim=(0, None))
    title = f"{figures['networks']}, {figures['width']}×{figures['height']}, {figures['dtype']}, {figures['device']}"
    by_picture.set_title(title, fontsize="small")
    for axis in axes:
        axis.legend()


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{device} ({line.partition(':')[2].strip()})"
    return f"{device} ({platform.processor() or platform.machine()})"
