"""Figures and time over guidance, steps and samplers: curves as in the paper's appendix I."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...geometry import Geometry
from ...pipeline import Sampling, Wuerstchen
from ...util.atomic import replacing
from ...util.errors import WuerstchenError, readable
from ...util.json_file import write_json
from ..plots import plotted
from ..timing import now
from .drawing import batches, draw_latent, finish
from .extractors import Extractor
from .figures import figures
from .reading import Scored, Scorer

SETTINGS = ("cfg", "steps_c", "steps_b", "sampler", "sampler_b", "schedule", "schedule_b", "distilled")  # of a row
AXES = ("steps_c", "cfg", "steps_b")  # what a curve may run along

Row = dict[str, Any]  # SETTINGS, "seconds" a picture, and figures by their names


def combinations(model: Wuerstchen, distilled: bool | None, given: Mapping[str, Sequence | None]) -> list[Sampling]:
    """Every combination of the values that are given, by the names that `Wuerstchen.sampling` has; each once.

    Raises WuerstchenError as it does.
    """
    several = {name: values for name, values in given.items() if values}
    products = [dict(zip(several, values, strict=True)) for values in itertools.product(*several.values())]
    samplings = [model.sampling(**one, distilled=distilled) for one in products]
    return list({json.dumps(settings(one)): one for one in samplings}.values())


def settings(sampling: Sampling) -> Row:
    c, b = sampling.stage_c, sampling.stage_b
    return dict(
        zip(
            SETTINGS,
            (c.cfg, c.steps, b.steps, c.sampler, b.sampler, c.schedule, b.schedule, bool(sampling.distilled)),
            strict=True,
        )
    )


def _settings(row: Row) -> Row:
    return {name: row[name] for name in SETTINGS}


def name_of(row: Mapping[str, Any]) -> str:
    """What the folder of a combination's pictures is called."""
    parts = [f"cfg{row['cfg']:g}", f"c{row['steps_c']}", row["sampler"], row["schedule"]]
    parts += [f"b{row['steps_b']}", row["sampler_b"], row["schedule_b"], *["distilled"] * row["distilled"]]
    return "-".join(parts)


def measure(
    model: Wuerstchen,
    prompts: Sequence[str],
    sampling: Sampling,
    geometry: Geometry,
    scorers: Mapping[str, Scorer],
    real: Scored | None,
    extractor: Extractor | None,
    batch: int,
    seed: int = 0,
    folder: Path | None = None,
) -> Row:
    """Draws all prompts and measures their pictures, which are written to `folder` as 000000.png, …, if it is given.

    `seconds` is the time that a picture took to draw, in batches of `batch`, without measuring or writing it. It has
    the figures of `figures`, and "NAME ±" for their spreads.

    Raises WuerstchenError if a prompt can't be read, or there are too few pictures for a figure.
    """
    values: dict[str, dict[int, Tensor]] = {name: {} for name in scorers}
    row, seconds = settings(sampling), 0.0
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with model.drawn_with(sampling), tqdm(total=len(prompts), desc=name_of(row), unit="picture", leave=False) as bar:
        for some in batches(model, prompts, seed, batch):
            start = now(model.device)
            latent = draw_latent(model, some, geometry, sampling.stage_c)
            images = finish(model, latent, some, geometry, sampling.stage_b)
            seconds += now(model.device) - start
            for name, scorer in scorers.items():
                scores = scorer([*rearrange(images, "b h w c -> b c h w")], some.prompts)
                values[name].update(zip(some.numbers, scores, strict=True))
            if folder is not None:
                _write(folder, some.numbers, images)
            bar.update(len(some.numbers))
    ordered = {name: torch.stack([by[i] for i in range(len(prompts))]) for name, by in values.items()}
    drawn = Scored([f"{i:06}" for i in range(len(prompts))], list(prompts), ordered)
    row["seconds"] = seconds / len(prompts)
    for figure in figures(drawn, real, extractor):
        row[figure.name] = figure.value
        if figure.spread is not None:
            row[f"{figure.name} ±"] = figure.spread
    return row


def _write(folder: Path, numbers: Sequence[int], images: Tensor) -> None:
    for number, image in zip(numbers, images, strict=True):
        with replacing(folder / f"{number:06}.png", sync=False) as partial:
            Image.fromarray((image * 255).round().byte().numpy()).save(partial, "PNG")


def warm_up(model: Wuerstchen, prompts: Sequence[str], sampling: Sampling, geometry: Geometry) -> None:
    """One step of each stage: what happens only once is not in the time of the first combination."""
    for some in batches(model, prompts, 0, len(prompts)):
        latent = draw_latent(model, some, geometry, replace(sampling.stage_c, steps=1))
        finish(model, latent, some, geometry, replace(sampling.stage_b, steps=1))


def sweep(
    samplings: Sequence[Sampling],
    about: Mapping[str, Any],
    output: Path,
    measured: Callable[[Sampling], Row],
    again: Callable[[Row], bool] = lambda row: False,
) -> Iterator[list[Row]]:
    """After each combination all rows so far, which are in the JSON file then; those that were in it are not measured.

    Rows of other combinations that are in the file stay in it; `again` says which ones of these are measured again.

    Raises WuerstchenError if the file is about something else than `about`.
    """
    wanted = [settings(one) for one in samplings]
    rows = [row for row in _read(output, about) if _settings(row) not in wanted or not again(row)]
    there = [_settings(row) for row in rows]
    if all(one in there for one in wanted):
        yield rows
    for sampling in (one for one in samplings if settings(one) not in there):
        rows.append(measured(sampling))
        write_json(output, {**about, "rows": rows})
        yield rows


def _read(path: Path, about: Mapping[str, Any]) -> list[Row]:
    """The rows of a file that an earlier run wrote about the same; none if there is no file."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text("utf-8"))
        rows = content.pop("rows")
        good = all(isinstance(row, dict) and row.keys() >= {*SETTINGS, "seconds"} for row in rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WuerstchenError(f"{path}: no file that `evaluate sweep` wrote; take another --output") from error
    if not good:
        raise WuerstchenError(f"{path}: no file that `evaluate sweep` wrote; take another --output")
    now_about = json.loads(json.dumps(about))
    changed = [name for name in {**content, **now_about} if content.get(name) != now_about.get(name)]
    if changed:
        raise WuerstchenError(
            f"{path}: an earlier sweep, with another {readable(', '.join(changed), 150)}: take another --output, or "
            "remove it"
        )
    return rows


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as lines of a table in Markdown, without spreads."""
    names = [name for name in rows[0] if not name.endswith(" ±")]
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield (
            "| "
            + " | ".join(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in names)
            + " |"
        )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Raises WuerstchenError if the file can't be written."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise WuerstchenError(f"{path}: could not be written ({error.strerror})") from error


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """FID over the CLIP score, if both are there (appendix I), and then a panel for each figure and the time.

    A line for each combination of what differs between rows, beside the axis; that is what has the most values.
    """
    axis = max(AXES, key=lambda name: len({row[name] for row in rows}))
    differs = [name for name in SETTINGS if name != axis and len({row[name] for row in rows}) > 1]
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[axis]):
        lines.setdefault(", ".join(f"{name} {row[name]}" for name in differs), []).append(row)
    names = [name for name in rows[0] if name not in SETTINGS and not name.endswith(" ±")]
    pairs = [("CLIP score", "FID")] if {"CLIP score", "FID"} <= {*names} else []
    pairs += [(axis, name) for name in (*names[1:], "seconds")]
    with plotted(path, panels=len(pairs), width=4.5, height=3.2, columns=3) as panels:
        for panel, (x, y) in zip(panels, pairs, strict=True):
            for label, points in lines.items():
                panel.plot([row[x] for row in points], [row[y] for row in points], marker="o", label=label)
                for row in points if x != axis else ():
                    panel.annotate(f"{row[axis]:g}", (row[x], row[y]), xytext=(3, 3), textcoords="offset points")
            panel.set(
                xlabel=x if x == axis else f"{x} (numbers: {axis})", ylabel="seconds a picture" if y == "seconds" else y
            )
            if differs:
                panel.legend(fontsize=6)
        panels[0].set_title(title, parse_math=False)
