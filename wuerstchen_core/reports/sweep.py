"""Solver × schedule × steps: how near few steps come to what many small ones draw, and what that is worth."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.samplers import STOCHASTIC
from ..util.errors import WuerstchenError
from .plots import plotted

Figures = Callable[[Tensor], dict[str, float]]  # of latents, by name


@dataclass(frozen=True)
class Setting:
    sampler: str
    schedule: str
    steps: int


Draw = Callable[[Setting, int], Tensor]  # (setting, seed) -> latents (conditions, draws of each, ...)


def grid(samplers: Iterable[str], schedules: Iterable[str], steps: Iterable[int]) -> list[Setting]:
    return [Setting(*one) for one in itertools.product(samplers, schedules, steps)]


def sweep(draw: Draw, settings: list[Setting], figures: Figures, reference_steps: int) -> Iterator[dict]:
    """One row per setting: its fields, `distance`, `energy` and the `figures` of its latents.

    `distance` is ||x - y|| / ||y|| to the solution of the ODE, by `reference_steps` steps of dpmpp_2m from the same
    noise; stochastic samplers, which draw something else from it, have None. `energy` is the energy distance to what as
    many steps of ddpm draw from other noise; the deterministic draw with less spread.
    """
    solution = draw(Setting("dpmpp_2m", "even", reference_steps), 0)
    ancestral = draw(Setting("ddpm", "even", reference_steps), 1)
    for setting in settings:
        drawn = draw(setting, 0)
        yield {
            **asdict(setting),
            "distance": None if setting.sampler in STOCHASTIC else distance(drawn, solution),
            "energy": energy_distance(drawn, ancestral),
            **figures(drawn),
        }


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The mean over latents (conditions, draws, ...) of ||ours - theirs|| / ||theirs||."""
    ours, theirs = ours.flatten(2), theirs.flatten(2)
    return ((ours - theirs).norm(dim=2) / theirs.norm(dim=2)).mean().item()


def energy_distance(ours: Tensor, theirs: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of latents (conditions, draws, ...), by pairs of draws of the same condition.

    Unbiased: around 0 where both are draws of one distribution. In units of the mean |y - y'|.
    """
    ours, theirs = ours.flatten(2).double(), theirs.flatten(2).double()
    if min(ours.shape[1], theirs.shape[1]) < 2:
        raise WuerstchenError("an energy distance needs at least 2 draws of each condition")
    across = torch.cdist(ours, theirs).mean()
    within, spread = (
        torch.cdist(one, one).sum() / (len(one) * one.shape[1] * (one.shape[1] - 1)) for one in (ours, theirs)
    )
    return ((2 * across - within - spread) / spread).item()


def table(rows: list[dict]) -> Iterator[str]:
    """The rows as lines of a table in Markdown."""
    names = list(rows[0])
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield "| " + " | ".join(_cell(row[name]) for name in names) + " |"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def plot(path: Path, rows: list[dict], title: str) -> None:
    """A panel per figure that any row has, over steps; a line per sampler and schedule."""
    figures = [name for name in rows[0] if name not in ("sampler", "schedule", "steps")]
    figures = [name for name in figures if any(row[name] is not None for row in rows)]
    lines = dict.fromkeys((row["sampler"], row["schedule"]) for row in rows)
    steps = sorted({row["steps"] for row in rows})
    with plotted(path, panels=len(figures), width=5.0) as panels:
        for panel, figure in zip(panels, figures, strict=True):
            for sampler, schedule in lines:
                points = [
                    (row["steps"], row[figure])
                    for row in rows
                    if (row["sampler"], row["schedule"]) == (sampler, schedule) and row[figure] is not None
                ]
                if points:
                    panel.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{sampler}, {schedule}")
            panel.set(xlabel="steps", ylabel=figure, title=title, xscale="log")
            panel.set_xticks(steps, [str(number) for number in steps])
            panel.minorticks_off()
            panel.legend(fontsize=7)
