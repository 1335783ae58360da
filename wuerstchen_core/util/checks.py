"""Checks of what a caller gives: the value itself comes back, or a WuerstchenError names it."""

import operator
from numbers import Real

from .errors import WuerstchenError


def whole_number(name: str, value: object, least: int, most: int, multiple_of: int = 1) -> int:
    """A whole number from `least` to `most`, of any integer type but bool."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # the last two are those of numpy's and torch's arrays
        number = None
    if number is None or not least <= number <= most or number % multiple_of:
        kind = "a whole number" if multiple_of == 1 else f"a multiple of {multiple_of}"
        raise WuerstchenError(f"{name} is {shown(value)}: it must be {kind} from {least} to {most}")
    return number


def real_number(name: str, value: object, least: float, most: float) -> float:
    """A number from `least` to `most`, of any real type but bool; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:  # type: ignore[operator]
        raise WuerstchenError(f"{name} is {shown(value)}: it must be a number from {least:g} to {most:g}")
    return float(value)


def interval(name: str, value: object, least: float, most: float) -> tuple[float, float]:
    """A lower and an upper bound, two numbers from `least` to `most`."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise WuerstchenError(f"{name} is {shown(value)}: it must be two numbers, the lower one first")
    low, high = (real_number(name, number, least, most) for number in value)
    if low > high:
        raise WuerstchenError(f"{name} is from {low:g} to {high:g}: it must be two numbers, the lower one first")
    return low, high


def one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    """One of the texts of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise WuerstchenError(f"unknown {name} {shown(value)}: take one of {', '.join(choices)}")
    return value


def text(name: str, value: object) -> str:
    """A text, not a list of texts."""
    if not isinstance(value, str):
        raise WuerstchenError(f"{name} is {shown(value)}: it must be one text (str)")
    return value


def shown(value: object, letters: int = 60) -> str:
    """A value as a message shows it: short, whatever it is."""
    try:
        told = repr(value) if isinstance(value, (str, bytes, int, float, type(None))) else ""
    except ValueError:  # a whole number of thousands of digits
        told = ""
    told = told or f"of type {type(value).__name__}"
    return told if len(told) <= letters else f"{told[:letters]}…"
