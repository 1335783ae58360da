"""Configurations of networks, checked field by field: they may come from a file of a stranger."""

import dataclasses
import typing
from collections.abc import Mapping
from functools import cache

from ..util.errors import WuerstchenError

LARGEST = 2**20  # of channels, blocks, tokens …
FARTHEST = 1e9  # of what is not counted


def config_from(cls: type, values: object):
    """A configuration from JSON's values: lists become tuples, and the inner configurations what they are.

    Raises:
        WuerstchenError: a field is unknown or missing, or its value is not of its type or range; see `check_config`.
    """
    config = _converted(cls.__name__, cls, values)
    _check_fields(config, {}, least=0)
    return config


def check_config(config, **least: int) -> None:
    """Checks a dataclass by the types of its fields.

    Whole numbers are from 1, or from what `least` has for their field, to 2**20, other numbers within ±1e9 (neither NaN
    nor infinite), tuples hold what they are declared to hold.

    Raises:
        WuerstchenError: naming the first field that is not so.
    """
    _check_fields(config, least, least=1)


def require(condition: bool, problem: str) -> None:
    """Raises WuerstchenError with the problem unless the condition holds."""
    if not condition:
        raise WuerstchenError(problem)


def _check_fields(config, several: Mapping[str, int], least: int) -> None:
    for name, hint in _hints(type(config)).items():
        _check(name, getattr(config, name), hint, several, several.get(name, least))


def _check(name: str, value, hint, several: Mapping[str, int], least: int) -> None:
    if _is_record(hint):
        require(isinstance(value, hint), f"{name} is {_shown(value)}: it must be a {hint.__name__}")
        _check_fields(value, several, least)
    elif typing.get_origin(hint) is tuple:
        require(isinstance(value, tuple), f"{name} is {_shown(value)}: it must be a list")
        for item in value:
            _check(name, item, typing.get_args(hint)[0], several, least)
    elif hint is bool:
        require(isinstance(value, bool), f"{name} is {_shown(value)}: it must be true or false")
    elif hint is int:
        whole = type(value) is int and least <= value <= LARGEST
        require(whole, f"{name} is {_shown(value)}: it must be a whole number from {least} to {LARGEST}")
    elif hint is float:
        number = type(value) in (int, float) and -FARTHEST <= value <= FARTHEST
        require(number, f"{name} is {_shown(value)}: it must be a number within ±{FARTHEST:g}")


_hints = cache(typing.get_type_hints)


def _is_record(hint) -> bool:
    return (
        dataclasses.is_dataclass(hint)
        or isinstance(hint, type)
        and issubclass(hint, tuple)
        and hasattr(hint, "_fields")
    )


def _converted(name: str, hint, value):
    if _is_record(hint):
        hints = _hints(hint)
        if isinstance(value, list) and issubclass(hint, tuple):  # JSON has a NamedTuple as a list
            require(len(value) <= len(hints), f"{name} has {len(value)} values: a {hint.__name__} has {len(hints)}")
            value = dict(zip(hints, value, strict=False))
        require(isinstance(value, Mapping), f"{name} is {_shown(value)}: it must be a {hint.__name__}")
        unknown = next((key for key in value if key not in hints), None)
        require(unknown is None, f"{name} has no field {unknown}")
        try:
            return hint(**{key: _converted(key, hints[key], item) for key, item in value.items()})
        except TypeError as error:
            raise WuerstchenError(f"{name} is incomplete: {error}") from error
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_converted(name, typing.get_args(hint)[0], item) for item in value)
    return value


def _shown(value) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.60}" if isinstance(value, bool | int | float | str | None) else f"a {type(value).__name__}"
