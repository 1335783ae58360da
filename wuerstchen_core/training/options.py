"""Options of a training run: dataclasses whose fields carry their help, read from TOML and from the command line.

    @dataclass(frozen=True)
    class Options:
        data: str = option(help="the folder")                     # must be given
        rate: float = option(1e-4, "learning rate")
        prompts: tuple[str, ...] = option((), "what samples show")
        network: StageCConfig = option(StageCConfig(), "the network's sizes")  # a table of its own: --network.depth 4

Types are bool, int, float, str, `tuple[TYPE, ...]`, named tuples (arrays in TOML) and dataclasses (tables).
"""

import dataclasses
import difflib
import json
import math
import os
import stat
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, NamedTuple

from ..util.errors import WuerstchenError, first_line, readable

NEEDED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
LARGEST = 1 << 63  # whole numbers in TOML, and seeds of torch, have 64 bits
LARGEST_FILE = 1 << 20  # bytes of a configuration
PLACEHOLDERS = {bool: True, int: 1, float: 1.0, str: "x"}


def option(default: Any = MISSING, help: str = "") -> Any:
    """A field of a dataclass of options; without a default it must be given."""
    metadata = {"help": help}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_at_least(least: int, options: Any, *names: str) -> None:
    """Raises WuerstchenError naming the first of these options that is less than `least`, or NaN."""
    for name in names:
        if not getattr(options, name) >= least:
            raise WuerstchenError(f"{name} is {getattr(options, name)}: it must be at least {least}")


def check_at_most(most: int, options: Any, *names: str) -> None:
    """Raises WuerstchenError naming the first of these options that is more than `most`."""
    for name in names:
        if getattr(options, name) > most:
            raise WuerstchenError(f"{name} is {getattr(options, name)}: it must be at most {most}")


def check_above_zero(options: Any, *names: str) -> None:
    """Raises WuerstchenError naming the first of these options that is not above 0, or not finite."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            raise WuerstchenError(f"{name} is {getattr(options, name)}: it must be above 0, and finite")


def check_shares(options: Any, *names: str) -> None:
    """Raises WuerstchenError naming the first of these options that is not from 0 to 1."""
    for name in names:
        if not 0 <= getattr(options, name) <= 1:
            raise WuerstchenError(f"{name} is {getattr(options, name)}: it must be from 0 to 1")


def check_utf8(name: str, *values: str) -> None:
    """Raises WuerstchenError naming an option if a text of it has what UTF-8 does not have."""
    for value in values:
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise WuerstchenError(f"{name}: {value[:60]!a} is not UTF-8")


class Listed(NamedTuple):
    """An option as the help lists it."""

    name: str  # with the names of its tables: network.depth
    type: Any
    default: Any  # MISSING where it must be given
    help: str


def listed(*classes: type, prefix: str = "") -> Iterator[Listed]:
    """All options of some dataclasses; those of a table are named `table.option`.

    An option without help has its table's."""
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            default = _default(field)
            if dataclasses.is_dataclass(hints[field.name]):
                about = field.metadata.get("help", "")
                for name, type_, own, help in listed(hints[field.name], prefix=f"{prefix}{field.name}."):
                    path = name.removeprefix(prefix).split(".")[1:]
                    yield Listed(name, type_, own if default is MISSING else _at(default, path), help or about)
            else:
                yield Listed(prefix + field.name, hints[field.name], default, field.metadata.get("help", ""))


def read(cls: type, table: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass from a TOML table. What a sub-table does not name keeps its default.

    Raises:
        WuerstchenError naming `where` and the option: it is unknown, of another type, or missing.
    """
    return read_all((cls,), table, where)[0]


def read_all(classes: Sequence[type], table: Mapping[str, Any], where: str) -> list:
    """Instances of several dataclasses whose options share one table."""
    _check_known(table, [field.name for cls in classes for field in dataclasses.fields(cls) if field.init], where)
    return [_read(cls, table, where) for cls in classes]


def override(classes: Sequence[type], table: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The table, updated with options from the command line, such as {"network.depth": "4"}.

    A value is written as in TOML; texts need no quotes.
    """
    types_of = {name: type_ for name, type_, _, _ in listed(*classes)}
    return merge(table, {name: _literal(text, types_of[name]) for name, text in given.items()})


def merge(table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The table, updated with Python values, such as {"network.depth": 4} or {"network": {"depth": 4}}."""
    merged = _plain(table)
    for name, value in given.items():
        first, _, rest = name.partition(".")
        value = {rest: value} if rest else _plain(value)
        if isinstance(value, dict):
            inner = merged.get(first, {})
            value = merge(inner if isinstance(inner, dict) else {}, value)
        merged[first] = value
    return merged


def written(classes: Sequence[type], table: Mapping[str, Any], where: str) -> str:
    """All options of some dataclasses with their help, as TOML: the table's values, and defaults for the others.

    An option that must be given and is not in the table stands in a comment. Raises WuerstchenError as `read`.
    """
    missing = {
        name: PLACEHOLDERS[type_]
        for name, type_, default, _ in listed(*classes)
        if default is MISSING and name not in table
    }
    sections: dict[str, list[str]] = {"": []}
    helps: dict[str, str] = {}
    for options in read_all(classes, missing | dict(table), where):
        for name, _, _, help in listed(type(options)):
            section, _, last = name.rpartition(".")
            lines = sections.setdefault(section, [f"\n[{section}]"])
            if help and helps.get(section) != help:
                helps[section] = help
                lines += textwrap.wrap(help, 110, initial_indent="# ", subsequent_indent="# ")
            value = "  # must be given" if name in missing else literal(_at(options, name.split(".")))
            lines.append(f"{'# ' if name in missing else ''}{last} = {value}")
    return "\n".join(line for lines in sections.values() for line in lines) + "\n"


def literal(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def load(path: str) -> dict[str, Any]:
    """A TOML file -> its table. Raises WuerstchenError if it is missing, not a regular file, too large or not TOML."""
    told = readable(path, 200)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise WuerstchenError(f"{told}: the configuration can't be read ({error.strerror})") from error
    except ValueError as error:  # its name may also contain a NUL character
        raise WuerstchenError(f"{told}: the configuration can't be read ({error})") from error
    if len(content) > LARGEST_FILE:
        raise WuerstchenError(f"{told}: the configuration has more than {LARGEST_FILE} bytes: is it a TOML file?")
    try:
        return _toml().loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise WuerstchenError(f"{told}: not a TOML file: {first_line(error)}") from error


def _read(cls: type, table: Mapping[str, Any], where: str, base: Any = None) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        if field.name in table:
            default = getattr(base, field.name) if base is not None else _default(field)
            values[field.name] = _checked(table[field.name], hints[field.name], f"{where}: {field.name}", default)
        elif base is not None:
            values[field.name] = getattr(base, field.name)
        elif _default(field) is MISSING:
            help = field.metadata.get("help")
            about = f" ({help})" if help else ""
            raise WuerstchenError(
                f"{where}: {field.name} is missing{about}: give --{field.name.replace('_', '-')}, or a configuration"
            )
    return cls(**values)


def _check_known(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in table:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            raise WuerstchenError(
                f"{where}: there is no option {_shown(name)}; there are {textwrap.shorten(', '.join(known), 200)}"
                + (f"; did you mean {close[0]}?" if close else "")
            )


def _checked(value: Any, type_: Any, where: str, default: Any = MISSING) -> Any:
    """The value, converted to its type. A whole number is taken for a float."""
    if isinstance(type_, type) and dataclasses.is_dataclass(type_):
        if not isinstance(value, Mapping):
            raise WuerstchenError(f"{where} is {_shown(value)}: a table is needed")
        _check_known(value, [field.name for field in dataclasses.fields(type_)], where)
        return _read(type_, value, where, None if default is MISSING else default)
    if isinstance(type_, type) and issubclass(type_, tuple) and hasattr(type_, "_fields"):
        if not isinstance(value, list) or len(value) != len(type_._fields):
            raise WuerstchenError(f"{where} is {_shown(value)}: a list of {', '.join(type_._fields)} is needed")
        kinds = typing.get_type_hints(type_).values()
        return type_(*(_checked(one, kind, where) for one, kind in zip(value, kinds, strict=True)))
    if typing.get_origin(type_) is tuple:
        if not isinstance(value, list):
            raise WuerstchenError(f'{where} is {_shown(value)}: a list is needed, such as [1, 2] or ["a", "b"]')
        return tuple(_checked(one, typing.get_args(type_)[0], where) for one in value)
    if typing.get_origin(type_) in (typing.Union, types.UnionType):
        type_ = next(kind for kind in typing.get_args(type_) if kind is not type(None))
        return _checked(value, type_, where)
    if type(value) is int and not -LARGEST <= value < LARGEST:
        raise WuerstchenError(f"{where} is of {value.bit_length()} bits: numbers have at most 64 bits, sign included")
    if type_ is float and type(value) is int:
        return float(value)
    if type(value) is not type_:
        raise WuerstchenError(f"{where} is {_shown(value)}: {NEEDED[type_]} is needed")
    if type_ is float and not math.isfinite(value):
        raise WuerstchenError(f"{where} is {value}: a finite number is needed")
    if type_ is str and "\0" in value:
        raise WuerstchenError(f"{where} is {value[:60]!a}: it contains a NUL character")
    return value


def _literal(text: str, type_: Any) -> Any:
    try:
        value = _toml().loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return value if type_ is not str or isinstance(value, str) else text


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), 80)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _at(default: Any, path: list[str]) -> Any:
    for name in path:
        default = getattr(default, name)
    return default


def _plain(value: Any) -> Any:
    """A Python value as a TOML file would give it."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _toml():
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError as error:
            raise WuerstchenError(
                f"options need tomli, which can't be imported ({readable(error)}): pip install tomli"
            ) from error
    return tomllib
