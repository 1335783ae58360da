"""peft's patterns for module names, matched without a regular expression.

They come from files of strangers, and one can be written that takes for ever. What is understood: letters, digits, `_`,
`-`; `.` for any letter; escaped punctuation (`\\.`) and `\\d`; each of them with `*`, `+` or `?` behind it; `^` and `$`
at the ends; and several alternatives with `|`.
"""

import re
from typing import NamedTuple

LONGEST = 400  # letters
ATOM = re.compile(r"(?:(?P<letter>[\w-])|(?P<any>\.)|\\(?P<escape>[^\w\s]|d))(?P<many>[*+?]?)")


class Atom(NamedTuple):
    letter: str  # itself, or where `is_class`: "." for any, "d" for a digit
    is_class: bool
    repeats: bool
    optional: bool

    def takes(self, letter: str) -> bool:
        if not self.is_class:
            return letter == self.letter
        return self.letter == "." or letter.isdecimal()


class Alternative(NamedTuple):
    bound: bool  # to the name's beginning
    atoms: tuple[Atom, ...]
    fixed: bool  # it matches names of one length only

    def matches(self, name: str) -> bool:
        if not self.fixed:
            return self._follow(name)
        start = len(name) - len(self.atoms)
        if start and (start < 0 or self.bound or name[start - 1] != "."):
            return False
        return all(atom.takes(letter) for atom, letter in zip(self.atoms, name[start:], strict=True))

    def _follow(self, name: str) -> bool:
        """Letter by letter, all the places in the pattern that reading the name may have led to."""
        places = self._onward({0})
        for letter in name:
            places = {
                after
                for place in places
                if place < len(self.atoms) and self.atoms[place].takes(letter)
                for after in ((place, place + 1) if self.atoms[place].repeats else (place + 1,))
            }
            places = self._onward(places | ({0} if letter == "." and not self.bound else set()))
        return len(self.atoms) in places

    def _onward(self, places: set[int]) -> set[int]:
        reached = set(places)
        for place in places:
            while place < len(self.atoms) and self.atoms[place].optional:
                place += 1
                reached.add(place)
        return reached


class Pattern:
    """A pattern for the whole of a module's name, or for its end behind a dot.

    Raises:
        ValueError: the pattern is longer or more than what is described above.
    """

    def __init__(self, pattern: str):
        if len(pattern) > LONGEST:
            raise ValueError(f"a pattern of {len(pattern)} letters is more than a module's name")
        self.alternatives = [_parse(text) for text in pattern.split("|")]

    @property
    def work(self) -> int:
        """About how many steps a letter of a name takes; 0 where it is compared at once."""
        return sum(len(alternative.atoms) for alternative in self.alternatives if not alternative.fixed)

    def matches(self, name: str) -> bool:
        return any(alternative.matches(name) for alternative in self.alternatives)


def _parse(text: str) -> Alternative:
    rest = text.removeprefix("^")
    rest = rest[:-1] if rest.endswith("$") and not rest.endswith("\\$") else rest
    atoms = []
    while rest:
        match = ATOM.match(rest)
        if match is None:
            raise ValueError(f"{text!r} is more than a module's name with ., * and +: write the names out")
        letter = match["letter"] or match["any"] or match["escape"]
        is_class = bool(match["any"]) or match["escape"] == "d"
        atoms.append(Atom(letter, is_class, match["many"] in ("*", "+"), match["many"] in ("*", "?")))
        rest = rest[match.end() :]
    fixed = not any(atom.repeats or atom.optional for atom in atoms)
    return Alternative(text.startswith("^"), tuple(atoms), fixed)
