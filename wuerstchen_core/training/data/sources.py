"""Sources: data sets whose pictures and captions have numbers. A folder is one."""

import hashlib
import logging
import os
import posixpath
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from einops import rearrange
from torch import Tensor

from ...util import pictures
from ...util.errors import WuerstchenError, readable
from .captions import FolderCaptions
from .files import check_regular, walk

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # whatever a file's name: some of Pillow's other formats start programs

log = logging.getLogger(__name__)


@runtime_checkable
class Source(Protocol):
    """`len(source)` pictures with captions. A sample for which `size` or `load` raises is skipped as a bad one."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The name of sample `i`."""

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) in pixels of the picture of sample `i`, known without decoding it."""

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        """Sample `i`: image (3, H, W) float32 in [0, 1] and caption. All randomness comes from the generator."""


@runtime_checkable
class FixedSource(Source, Protocol):
    """A source whose pictures are the same each time, so that their features can be cached."""

    def caption(self, i: int, generator: random.Random) -> str:
        """The caption that `load` gives with this generator; it may be one of several."""

    def stamp(self, i: int) -> str:
        """Something that changes whenever the picture of sample `i` does, found without decoding it."""


@runtime_checkable
class OrderedSource(Source, Protocol):
    """A source that has reasons of its own for the order of an epoch."""

    def order(self, generator: random.Random) -> list[int]:
        """The numbers of all samples in a random order."""


def epoch_order(source: Source, generator: random.Random) -> list[int]:
    """The samples in the order of an epoch: the source's own, if it has one, or any."""
    if isinstance(source, OrderedSource):
        return source.order(generator)
    order = list(range(len(source)))
    generator.shuffle(order)
    return order


class FolderSource:
    """The pictures in a folder and all folders below it, with the captions that `FolderCaptions` finds for them.

    Pictures end in .jpg, .jpeg, .png or .webp, in any case. Hidden files and what other programs leave behind are left
    out; linked folders are followed. `caption_key` names the key of captions in JSON and metadata files.

    Raises WuerstchenError if there is no such folder or no picture in it.
    """

    def __init__(self, folder: str | Path, caption_key: str = ""):
        self.folder = Path(folder)
        if not str(folder).strip() or not os.path.isdir(self.folder):
            raise WuerstchenError(f"{readable(folder)}: there is no such folder")
        files = list(walk(self.folder))
        self.keys = sorted(
            posixpath.join(inside, name) for inside, names in files for name in names if name.lower().endswith(SUFFIXES)
        )
        if not self.keys:
            raise WuerstchenError(f"{readable(folder)}: there is no picture in it ({', '.join(SUFFIXES)})")
        self._captions = FolderCaptions(self.folder, files, caption_key)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, i: int) -> str:
        return self.keys[i]

    def size(self, i: int) -> tuple[int, int]:
        return pictures.size_of(self._picture(i), FORMATS)

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        text = self.caption(i)
        return rearrange(pictures.decode(self._picture(i), FORMATS), "h w c -> c h w"), text

    def caption(self, i: int, generator: random.Random | None = None) -> str:
        """The caption, or "" if there is none. Raises OSError or ValueError if it can't be read."""
        return self._captions.find(self.keys[i]) or ""

    def stamp(self, i: int) -> str:
        status = (self.folder / self.keys[i]).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def check_captions(self, required: bool) -> None:
        """Warns of the number of pictures without a caption.

        Raises WuerstchenError if captions are required and all are missing or empty.
        """
        missing = [key for key in self.keys if not self._captions.has(key)]
        if required and (len(missing) == len(self) or not any(map(self._has_text, range(len(self))))):
            raise WuerstchenError(
                f"{readable(self.folder, 150)}: none of its {len(self)} pictures has a caption (NAME.txt, "
                "NAME.caption, NAME.json, metadata.jsonl or metadata.csv); --caption-key names the caption's key in "
                "the last three, and --allow-empty-captions true trains without captions"
            )
        if missing:
            log.warning(
                "%d of %d pictures have no caption and are learned with an empty one, such as %s",
                len(missing),
                len(self),
                readable(missing[0]),
            )

    def _has_text(self, i: int) -> bool:
        try:
            return bool(self.caption(i))
        except Exception:  # a bad sample: it is skipped, and reported, when it is loaded
            return False

    def _picture(self, i: int) -> Path:
        path = self.folder / self.keys[i]
        check_regular(path)
        return path


class Part:
    """Some samples of a source, as a source; their order in an epoch is that of the whole."""

    def __init__(self, source: Any, samples: Sequence[int]):
        self.source, self.samples = source, list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, i: int) -> str:
        return self.source.key(self.samples[i])

    def size(self, i: int) -> tuple[int, int]:
        return self.source.size(self.samples[i])

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        return self.source.load(self.samples[i], generator)

    def order(self, generator: random.Random) -> list[int]:
        numbers = {sample: i for i, sample in enumerate(self.samples)}
        return [numbers[sample] for sample in epoch_order(self.source, generator) if sample in numbers]


class FixedPart(Part):
    """Some samples of a `FixedSource`."""

    def caption(self, i: int) -> str:
        return self.source.caption(self.samples[i])

    def stamp(self, i: int) -> str:
        return self.source.stamp(self.samples[i])


def part_of(source: Source, held_out: int, validation: bool) -> Part:
    """`held_out` samples for validation, or all others. Which ones follows from the hashes of their names alone, so
    that a few more pictures exchange few of them.

    Raises WuerstchenError if none would be left to learn from.
    """
    if held_out >= len(source):
        raise WuerstchenError(
            f"held_out is {held_out}: there are only {len(source)} pictures, and some must be learned"
        )
    numbers = sorted(
        range(len(source)), key=lambda i: hashlib.blake2b(source.key(i).encode("utf-8", "replace")).digest()
    )
    chosen = sorted(numbers[:held_out] if validation else numbers[held_out:])
    return (FixedPart if isinstance(source, FixedSource) else Part)(source, chosen)


Recogniser = Callable[[str], Source | None]
_RECOGNISERS: list[Recogniser] = []


def register(recogniser: Recogniser) -> None:
    """Makes another kind of data set known: `recogniser` takes the value of `data` and returns its source, or None."""
    if recogniser not in _RECOGNISERS:
        _RECOGNISERS.append(recogniser)


def recognised(data: str) -> Source | None:
    """The source that a registered recogniser makes of `data`, or None if none of them knows it."""
    found = (recogniser(data) for recogniser in _RECOGNISERS)
    return next((source for source in found if source is not None), None)
