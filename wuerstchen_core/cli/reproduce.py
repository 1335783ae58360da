"""`wuerstchen generate --from PICTURE`: the options that a picture's record stands for."""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from ..util.errors import WuerstchenError, one_line
from .common import NETWORKS, given_networks

OPTIONS = {"negative_prompt": "--negative", "batch_size": "--batch", "text_encoder_c": "--text-encoder"}


def fill_in(options: argparse.Namespace) -> None:
    """Sets what the picture says and the command line does not; what cannot be the same is told on stderr.

    Files that the picture names are looked for in the current folder, then beside the picture.
    """
    from ..workflow import png

    source = options.source
    asked = png.read(source)
    if options.output.exists() and options.output.resolve() == source.resolve():
        raise WuerstchenError(f"{options.output}: it would take the place of the picture that is read: give another -o")
    for name, value in asked.settings.items():
        if name in ("batch_number", "device", "dtype") or getattr(options, name, None) is not None:
            continue
        if name == "distilled":
            value = bool(value)
        elif name in ("model", "image", *NETWORKS):
            value = None if (name, value) == ("model", "mini") else _found(value, _option(name), source)
        elif name == "loras":
            loras = map(read_lora, value)
            value = [f"{_found(path.name, '--lora', source)}:{shown_strength(strength)}" for path, strength in loras]
        setattr(options, name, value)
    for remark in asked.remarks:
        print(one_line(f"wuerstchen: {source}: {remark}"), file=sys.stderr)


def _found(name: str, option: str, source: Path) -> Path:
    for path in (Path(name), source.parent / name):
        if name and path.exists():
            return path
    raise WuerstchenError(f"{source}: it was drawn with {name!r}, which is neither here nor beside it: give {option}")


def command_line(options: argparse.Namespace, settings: Mapping) -> str:
    """What to type for the same picture, without the one that was read; `settings` are those that are not defaults."""
    networks = {"model": options.model, "image": options.image, **given_networks(options)}
    given = {**settings, **{name: path for name, path in networks.items() if path is not None}}
    words = [word for name, value in given.items() for word in _words(_option(name), value)]
    words += [word for lora in options.loras or () for word in _words("--lora", lora)]
    if options.device != "cpu":
        words += ["--device", options.device]
    words += _words("-o", str(options.output))
    return shlex.join(["wuerstchen", "generate", *words, *["--"] * options.prompt.startswith("-"), options.prompt])


def _words(option: str, value) -> list[str]:
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    if isinstance(value, (list, tuple)):
        return [option, *map(str, value)]
    value = str(value)
    return [f"{option}={value}"] if value.startswith("-") else [option, value]


def _option(name: str) -> str:
    return OPTIONS.get(name, f"--{name.replace('_', '-')}")


def read_lora(text: str) -> tuple[Path, float]:
    """FILE[:STRENGTH]; only a number behind the last colon is a strength, so that a path may have colons."""
    path, _, number = text.rpartition(":")
    try:
        return (Path(path), float(number)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def shown_strength(strength: float) -> str:
    """The shortest text of a number that keeps it whole."""
    return f"{strength:g}" if float(f"{strength:g}") == strength else repr(strength)
