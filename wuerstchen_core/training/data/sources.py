"""Sources: sets of pictures with captions, by number. A folder is one."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from einops import rearrange
from torch import Tensor

from ...util import pictures
from ...util.errors import WuerstchenError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # whatever a file's name: some of Pillow's other formats start programs


@runtime_checkable
class Source(Protocol):
    """`len(source)` pictures with captions. What `size` and `load` raise makes a sample a bad one, nothing worse."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The name of sample `i`."""

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) in pixels of the picture of sample `i`, known without decoding it."""

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        """Sample `i`: image (3, H, W) float32 in [0, 1] and caption. What is random follows from the generator."""


@runtime_checkable
class FixedSource(Source, Protocol):
    """A source whose samples are the same each time, so that their features can be cached."""

    def caption(self, i: int) -> str:
        """The caption that `load` gives."""

    def stamp(self, i: int) -> str:
        """Something that changes when the picture of sample `i` does; cheaper than decoding it."""


class FolderSource:
    """The pictures in a folder and all below it, each with its caption in `name.txt` beside `name.jpg`.

    Pictures end in .jpg, .jpeg, .png or .webp; a caption is UTF-8, and "" where there is no such file. Names that begin
    with a dot are left out, and links to folders are not followed.

    Raises WuerstchenError where there is no such folder, or no picture in it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise WuerstchenError(f"{folder}: there is no such folder")
        self.keys = sorted(
            Path(parent, name).relative_to(self.folder).as_posix()
            for parent, _, names in os.walk(self.folder)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )
        if not self.keys:
            raise WuerstchenError(f"{folder}: there is no picture in it ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, i: int) -> str:
        return self.keys[i]

    def size(self, i: int) -> tuple[int, int]:
        return pictures.size_of(self.folder / self.keys[i], FORMATS)

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        text = self.caption(i)
        return rearrange(pictures.decode(self.folder / self.keys[i], FORMATS), "h w c -> c h w"), text

    def caption(self, i: int) -> str:
        path = (self.folder / self.keys[i]).with_suffix(".txt")
        try:
            return read_caption(path.read_bytes())
        except FileNotFoundError:
            return ""

    def stamp(self, i: int) -> str:
        status = (self.folder / self.keys[i]).stat()
        return f"{status.st_size} {status.st_mtime_ns}"


Recogniser = Callable[[str], Source | None]
_RECOGNISERS: list[Recogniser] = []


def register(recogniser: Recogniser) -> None:
    """Makes another kind of data set known: `recogniser` gets what `data` names and returns its source, or None."""
    if recogniser not in _RECOGNISERS:
        _RECOGNISERS.append(recogniser)


def recognised(data: str) -> Source | None:
    """The source that a registered kind of data set makes of `data`, or None where it is none of them."""
    sources = (recogniser(data) for recogniser in _RECOGNISERS)
    return next((source for source in sources if source is not None), None)


def read_caption(content: bytes) -> str:
    """The content of a caption file -> its text. Raises UnicodeDecodeError where it is not UTF-8."""
    return content.decode("utf-8-sig").strip()
