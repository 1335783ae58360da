"""Emphasis in a prompt, as ComfyUI's users write it."""

import re

EMPHASIS = 1.1  # what a pair of parentheses without a number multiplies by

_WEIGHTED = re.compile(r"(.*):\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*", re.DOTALL)
_ESCAPES = {r"\(": "\ue000", r"\)": "\ue001"}


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    """Prompt -> its parts and their weights.

    `(text)` is 1.1 times what is around it, `(text:1.3)` is 1.3, both nest; `\\(` and `\\)` are parentheses to be read,
    and so is one that has no partner.
    """
    for escape, mark in _ESCAPES.items():
        prompt = prompt.replace(escape, mark)
    parts = _parse(prompt, 1.0)
    for escape, mark in _ESCAPES.items():
        parts = [(text.replace(mark, escape[1]), weight) for text, weight in parts]
    return [(text, weight) for text, weight in parts if text]


def _parse(text: str, weight: float) -> list[tuple[str, float]]:
    parts, position = [], 0
    for start, end in _groups(text):
        parts.append((text[position:start], weight))
        inner = text[start + 1 : end]
        weighted = _WEIGHTED.fullmatch(inner)
        parts += _parse(weighted[1], float(weighted[2])) if weighted else _parse(inner, weight * EMPHASIS)
        position = end + 1
    return [*parts, (text[position:], weight)]


def _groups(text: str) -> list[tuple[int, int]]:
    """Where the outermost pairs of parentheses begin and end."""
    groups, opened = [], []
    for position, character in enumerate(text):
        if character == "(":
            opened.append(position)
        elif character == ")" and opened:
            start = opened.pop()
            groups = [group for group in groups if group[0] < start] + [(start, position)]
    return groups
