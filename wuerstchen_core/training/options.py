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
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, NamedTuple

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

from ..util.errors import WuerstchenError

NEEDED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def option(default: Any = MISSING, help: str = "") -> Any:
    """A field of a dataclass of options; without a default it must be given. % in the help is a plain one."""
    metadata = {"help": help}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_at_least(least: int, options: Any, *names: str) -> None:
    """Raises WuerstchenError naming the first of these options that is below."""
    for name in names:
        if getattr(options, name) < least:
            raise WuerstchenError(f"{name} is {getattr(options, name)}: it must be at least {least}")


def check_above_zero(options: Any, *names: str) -> None:
    """Raises WuerstchenError naming the first of these options that is not above 0, or not finite."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            raise WuerstchenError(f"{name} is {getattr(options, name)}: it must be above 0")


def check_shares(options: Any, *names: str) -> None:
    """Raises WuerstchenError naming the first of these options that is not from 0 to 1."""
    for name in names:
        if not 0 <= getattr(options, name) <= 1:
            raise WuerstchenError(f"{name} is {getattr(options, name)}: it must be from 0 to 1")


class Listed(NamedTuple):
    """An option as a help shows it."""

    name: str  # with the names of its tables: network.depth
    type: Any
    default: Any  # MISSING where it must be given
    help: str


def listed(*classes: type, prefix: str = "") -> Iterator[Listed]:
    """All options of some dataclasses, those of tables after the table's name and a dot.

    Where they have no help of their own they get their table's."""
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
    """An instance of a dataclass from a TOML table. What a sub-table doesn't name stays as the default has it.

    Raises:
        WuerstchenError naming `where` and the option: it is unknown, of another type, or missing.
    """
    return read_all((cls,), table, where)[0]


def read_all(classes: Sequence[type], table: Mapping[str, Any], where: str) -> list:
    """The same for several dataclasses, whose options lie side by side in one table."""
    _check_known(table, [field.name for cls in classes for field in dataclasses.fields(cls) if field.init], where)
    return [_read(cls, table, where) for cls in classes]


def override(classes: Sequence[type], table: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The table with options from the command line in their places: {"network.depth": "4"}.

    A value is written as in TOML; texts need no quotes.
    """
    types_of = {name: type_ for name, type_, _, _ in listed(*classes)}
    merged = _copied(table)
    for name, text in given.items():
        *tables, last = name.split(".")
        inner = merged
        for part in tables:
            inner = inner.setdefault(part, {})
        inner[last] = _literal(text, types_of[name])
    return merged


def load(path: str) -> dict[str, Any]:
    """A TOML file -> its table. Raises WuerstchenError where it is missing or is no TOML."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise WuerstchenError(f"{path}: the configuration can't be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WuerstchenError(f"{path}: this is no TOML: {error}") from error


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
            raise WuerstchenError(f"{where}: {field.name} is missing" + (f" ({help})" if help else ""))
    return cls(**values)


def _check_known(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in table:
        if name not in known:
            raise WuerstchenError(f"{where}: there is no option {name!r}; there are {', '.join(known)}")


def _checked(value: Any, type_: Any, where: str, default: Any = MISSING) -> Any:
    """The value as the type has it; whole numbers may stand for others."""
    if dataclasses.is_dataclass(type_):
        if not isinstance(value, Mapping):
            raise WuerstchenError(f"{where} is {value!r}: a table is needed")
        _check_known(value, [field.name for field in dataclasses.fields(type_)], where)
        return _read(type_, value, where, None if default is MISSING else default)
    if isinstance(type_, type) and issubclass(type_, tuple) and hasattr(type_, "_fields"):
        if not isinstance(value, list) or len(value) != len(type_._fields):
            raise WuerstchenError(f"{where} is {value!r}: a list of {', '.join(type_._fields)} is needed")
        kinds = typing.get_type_hints(type_).values()
        return type_(*(_checked(one, kind, where) for one, kind in zip(value, kinds)))
    if typing.get_origin(type_) is tuple:
        if not isinstance(value, list):
            raise WuerstchenError(f'{where} is {value!r}: a list is needed, such as [1, 2] or ["a", "b"]')
        return tuple(_checked(one, typing.get_args(type_)[0], where) for one in value)
    if typing.get_origin(type_) in (typing.Union, types.UnionType):
        type_ = next(kind for kind in typing.get_args(type_) if kind is not type(None))
        return _checked(value, type_, where)
    if type_ is float and type(value) is int:
        return float(value)
    if type(value) is not type_:
        raise WuerstchenError(f"{where} is {value!r}: {NEEDED[type_]} is needed")
    return value


def _literal(text: str, type_: Any) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if type_ is not str or isinstance(value, str) else text


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _at(default: Any, path: list[str]) -> Any:
    for name in path:
        default = getattr(default, name)
    return default


def _copied(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in table.items()}
