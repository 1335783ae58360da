"""A file of prompts -> what to draw, a line each: .txt (a prompt a line), .jsonl or .csv (the fields in FIELDS)."""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..diffusion.options import MAX_SEED, MIN_SEED, SamplingOptions
from ..geometry import Geometry
from ..pipeline import Sampling
from ..util.checks import shown, text, whole_number
from ..util.errors import WuerstchenError, first_line

LONGEST_NAME = 100  # bytes of an id in UTF-8


def _floats(value: str) -> tuple[float, ...]:
    return tuple(map(float, value.split()))


def _boolean(value: str) -> bool | str:
    return {"true": True, "false": False}.get(value.lower(), value)


# Field -> what turns a table's text into its value. The names are those that `Wuerstchen.generate` has.
FIELDS: dict[str, Callable[[str], Any]] = {
    "prompt": str, "negative": str, "id": str, "lora": str, "seed": int, "seed_b": int, "width": int, "height": int,
    "steps_c": int, "cfg_c": float, "steps_b": int, "cfg_b": float, "sampler": str, "sampler_b": str, "schedule": str,
    "schedule_b": str, "cfg_interval": _floats, "cfg_rescale": float, "distilled": _boolean,
}  # fmt: skip
# What `Wuerstchen.sampling` decides by, where it is given.
SAMPLING = ("steps_c", "cfg_c", "steps_b", "cfg_b", "sampler", "sampler_b", "schedule", "schedule_b", "cfg_interval",
            "cfg_rescale", "negative_prompt", "distilled")  # fmt: skip
# What all lines can have of the command line.
SETTINGS = ("negative_prompt", *(name for name in FIELDS if name not in ("prompt", "negative", "id", "lora")), "tile")


@dataclass(frozen=True)
class Line:
    """A picture to draw: its place among all of the file, its name, and settings as `Wuerstchen.generate` has them."""

    index: int
    number: int  # in the file, from 1
    name: str
    settings: Mapping[str, Any]
    loras: tuple[str, ...] = ()  # FILE[:STRENGTH]
    latent: Path | None = None  # of Stage C, where it is drawn already

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.settings["width"], self.settings["height"])

    @property
    def seed_b(self) -> int:
        return self.settings.get("seed_b", self.settings["seed"])


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be drawn, and why."""

    index: int
    number: int
    reason: str
    content: Any = None


@dataclass
class Prompts:
    """The lines of a file in their order, good and bad.

    What a line does not say is as in `asked` (by the names of `Wuerstchen.generate`; width, height and seed at least),
    with the line's index from 0 added to the seeds. What neither says of sampling is by the set's own defaults:
    `sampling` is its `Wuerstchen.sampling`, and with a LoRA its networks are not the distilled ones, as in `generate`.
    Lines without a character are left out and not counted.
    """

    path: str
    asked: Mapping[str, Any]
    sampling: Callable[..., Sampling]
    loras: tuple[str, ...] = ()
    _names: set[str] = field(default_factory=set, init=False)

    def __iter__(self) -> Iterator[Line | BadLine]:
        self._names = set()
        for index, (number, row) in enumerate(_rows(self.path)):
            try:
                if isinstance(row, Exception):
                    raise WuerstchenError(first_line(row))
                yield self._line(index, number, row)
            except WuerstchenError as error:
                yield BadLine(index, number, str(error), None if isinstance(row, Exception) else row)

    def _line(self, index: int, number: int, row: Mapping) -> Line:
        row = {name: value for name, value in row.items() if value is not None}
        if unknown := [name for name in row if name not in FIELDS]:
            raise WuerstchenError(f"unknown field {shown(unknown[0])}: take some of {', '.join(FIELDS)}")
        if "prompt" not in row:
            raise WuerstchenError("there is no prompt")
        settings = {**self.asked, "seed": self.asked["seed"] + index}
        if "seed_b" in settings:
            settings["seed_b"] += index
        loras, name = row.pop("lora", self.loras), row.pop("id", f"{index:06}")
        if "negative" in row:
            settings["negative_prompt"] = row.pop("negative")
        settings |= row
        for key in ("prompt", "negative_prompt"):
            _check_letters(key, text(key, settings.get(key, "")))
        loras = (loras,) if isinstance(loras, str) else loras
        if not isinstance(loras, (list, tuple)):
            raise WuerstchenError(f"lora is {shown(loras)}: it must be FILE or FILE:STRENGTH, or a list of them")
        for lora in loras:
            _check_letters("lora", text("lora", lora))
        settings = completed(settings, self.sampling, bool(loras))
        for key in ("seed", "seed_b"):
            if key in settings:
                whole_number(key, settings[key], MIN_SEED, MAX_SEED)
        line = Line(index, number, self._name(name), settings, tuple(loras))
        _ = line.geometry
        self._names.add(line.name.casefold())
        return line

    def _name(self, name: object) -> str:
        name = str(name) if isinstance(name, int) and not isinstance(name, bool) else text("id", name)
        if not re.fullmatch(r"[\w-]+", name) or len(name.encode()) > LONGEST_NAME:
            raise WuerstchenError(
                f"id is {shown(name)}: it names a file and must be letters, digits, - and _, {LONGEST_NAME} at most"
            )
        if name.casefold() in self._names:
            raise WuerstchenError(f"id {shown(name)} is that of an earlier line: give each its own")
        return name


def completed(asked: Mapping[str, Any], sampling: Callable[..., Sampling], with_lora: bool) -> dict[str, Any]:
    """Settings in which everything is said that decides how the stages sample.

    Raises WuerstchenError as `Wuerstchen.generate` does.
    """
    chosen = {name: asked[name] for name in SAMPLING if name in asked}
    if with_lora:
        chosen.setdefault("distilled", False)
    if not isinstance(chosen.get("distilled", False), bool):
        raise WuerstchenError(f"distilled is {shown(chosen['distilled'])}: it must be true or false")
    return {"negative_prompt": "", **asked, **sampling(**chosen).settings}


def stage_c_options(settings: Mapping[str, Any]) -> SamplingOptions:
    """How Stage C samples. Raises WuerstchenError as `Wuerstchen.generate` does."""
    names = ("sampler", "schedule", "cfg_interval", "cfg_rescale")
    return SamplingOptions(settings["steps_c"], settings["cfg_c"], **{name: settings[name] for name in names})


def stage_b_options(settings: Mapping[str, Any]) -> SamplingOptions:
    """How Stage B samples. Raises WuerstchenError as `Wuerstchen.generate` does."""
    sampler = settings.get("sampler_b", settings["sampler"])
    return SamplingOptions(settings["steps_b"], settings["cfg_b"], sampler, settings["schedule_b"])


def _check_letters(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise WuerstchenError(f"{name} is not UTF-8, from position {error.start} on") from error


def _rows(path: str) -> Iterator[tuple[int, Mapping | Exception]]:
    """(number of the line, its fields or what is wrong with it)"""
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    whole = content.decode("utf-8-sig", "surrogateescape")  # what is not UTF-8 is found line by line
    suffix = Path(path).suffix.lower()
    if path == "-":
        suffix = ".jsonl" if whole.lstrip().startswith("{") else ".txt"
    if suffix == ".csv":
        yield from _csv_rows(whole)
        return
    if suffix not in (".txt", ".jsonl"):
        raise WuerstchenError(f"{path}: prompts are read from .txt, .jsonl or .csv, or from - (stdin)")
    for number, line in enumerate(whole.split("\n"), start=1):
        if line.strip():
            yield number, {"prompt": line.strip()} if suffix == ".txt" else _json_row(line)


def _json_row(line: str) -> Mapping | Exception:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return WuerstchenError(f"not JSON: {first_line(error)}")
    return row if isinstance(row, dict) else WuerstchenError(f"not a JSON object: {shown(line.strip())}")


def _csv_rows(whole: str) -> Iterator[tuple[int, Mapping | Exception]]:
    reader = csv.DictReader(io.StringIO(whole, newline=""), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, WuerstchenError(f"not a row of a table: {error}")
            continue
        if None in row:
            yield reader.line_num, WuerstchenError("it has more fields than the first line")
        else:
            yield reader.line_num, _typed(row)


def _typed(row: Mapping[str, str | None]) -> Mapping | Exception:
    """What is empty is left out, but for texts: an empty prompt or negative is one."""
    typed = {}
    for name, value in row.items():
        if value is None or (value == "" and name not in ("prompt", "negative")):
            continue
        try:
            typed[name] = FIELDS.get(name, str)(value)
        except ValueError:
            return WuerstchenError(f"{name} is {shown(value)}: it must be a number")
    return typed
