"""Emphasis in a prompt, read exactly as ComfyUI reads it."""

import math
from itertools import accumulate

from ..util.checks import shown
from ..util.errors import WuerstchenError

EMPHASIS = 1.1  # what a pair of parentheses without a number multiplies by


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    """Prompt -> its parts and their weights.

    `(text)` is 1.1 times what is around it, `(text:1.3)` is 1.3, both nest; `\\(` and `\\)` are parentheses to be read,
    and so is one that has no partner: behind a `)` too many, the next `(` only makes up for it; a `(` that is never
    closed is read together with all that follows, unless that ends in `)`, which then closes it.

    Raises:
        WuerstchenError: a weight is infinite or not a number.
    """
    marks = _marks(prompt)
    closed_by = _partners(marks)
    opened = iter(sorted(closed_by))
    colon_before = list(accumulate((i if c == ":" else -1 for i, c in enumerate(prompt)), max, initial=-1))
    mark_before = list(accumulate((i if mark else -1 for i, mark in enumerate(marks)), max, initial=-1))

    def weighted(start: int, end: int, outside: float) -> tuple[int, float]:
        """Where the text of a pair of parentheses with this inside ends, and its weight."""
        colon = colon_before[end]
        if colon > start and mark_before[end] < colon:  # no number has parentheses
            try:
                return colon, _finite(float(prompt[colon + 1 : end]), prompt[start:end])
            except WuerstchenError:
                raise
            except ValueError:
                pass
        return end, _finite(outside * EMPHASIS, prompt[start:end])

    parts: list[tuple[str, float]] = []
    waiting = [(0, len(prompt), 1.0)]  # what is left to read, the next last: from where, to where, weight
    following = next(opened, None)
    while waiting:
        start, end, weight = waiting.pop()
        while following is not None and following < start:
            following = next(opened, None)
        if following is None or following >= end:
            parts.append((prompt[start:end], weight))
            continue
        parts.append((prompt[start:following], weight))
        close = closed_by[following]
        if close >= end:  # never closed here
            close = end - 1
            if marks[close] != ")" or close == following:
                parts.append((prompt[following:end], weight))
                continue
        waiting.append((close + 1, end, weight))
        text_end, inner = weighted(following + 1, close, weight)
        waiting.append((following + 1, text_end, inner))
    return [(text.replace("\\(", "(").replace("\\)", ")"), weight) for text, weight in parts if text]


def _marks(prompt: str) -> list[str]:
    """Of each character: itself if it is a parenthesis that no backslash escapes, else nothing."""
    marks = [character if character in "()" else "" for character in prompt]
    for i in range(1, len(prompt)):
        if prompt[i - 1] == "\\":
            marks[i] = ""
    return marks


def _partners(marks: list[str]) -> dict[int, int]:
    """Where the parentheses that open a part are -> where each is closed, or else the end."""
    partners: dict[int, int] = {}
    opened: list[int] = []
    surplus = 0  # of closing ones
    for position, mark in enumerate(marks):
        if mark == "(" and surplus:
            surplus -= 1
        elif mark == "(":
            opened.append(position)
        elif mark == ")" and opened:
            partners[opened.pop()] = position
        elif mark == ")":
            surplus += 1
    return partners | dict.fromkeys(opened, len(marks))


def _finite(weight: float, text: str) -> float:
    if not math.isfinite(weight):
        raise WuerstchenError(f"the weight of {shown(text)} in the prompt is {weight}: it must be a finite number")
    return weight
