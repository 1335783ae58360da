"""An index of shards on a disk: where each sample lies in its tar file, so that any of them can be read by itself.

With it shards are a source like a folder. A run keeps it in its own folder and goes on at its place without reading
what it has seen, with any number of processes and workers. Neither torchdata's StatefulDataLoader, which needs the same
number of workers and would keep their buffers of pictures in every checkpoint, nor mosaicml-streaming, which reads only
its own format, can do that with tar files.
"""

import hashlib
import io
import logging
import os
import random
import tarfile
from bisect import bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ...util import pictures
from ...util.atomic import replacing
from ...util.errors import WuerstchenError, readable
from .buckets import Size
from .files import check_regular
from .filters import KEEP_ALL, Filters, scores
from .shards import (
    READ,
    Header,
    RawSample,
    ShardBatch,
    caption_of,
    cause,
    grouped,
    joined,
    local_path,
    parsed,
    picture_suffix,
)
from .sources import FORMATS

SUFFIXES = sorted(READ)
FORMAT = f"1.{len(SUFFIXES)}"  # of the index's files
SHUFFLED_SHARDS = 16  # shards whose samples are shuffled together: the disk reads in few places at a time
HEAD = 1 << 14  # bytes that nearly always hold a picture's header
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """Where a file lies in a shard, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True)
class ShardIndex:
    """What is known of one shard's samples without decoding them: N samples, F files."""

    stamp: str  # of the shard's file: another one makes the index worthless
    keys: list[str]
    files: np.ndarray  # (F, 3): number of the suffix, offset, length
    starts: np.ndarray  # (N + 1,): sample i has files[starts[i] : starts[i + 1]]
    sizes: np.ndarray  # (N, 2): height and width in pixels
    scores: np.ndarray  # (N, 4), as `filters.scores` gives them
    told: list[str]  # what can't be used, and why

    def spans(self, i: int) -> dict[str, Span]:
        rows = self.files[self.starts[i] : self.starts[i + 1]].tolist()
        return {SUFFIXES[suffix]: Span(offset, length) for suffix, offset, length in rows}


class ShardSource:
    """The samples of local shards that are not compressed, those that the filters keep, as a `FixedSource`.

    Args:
        folder: keeps the index, a file for each shard, written as a whole or not at all; a shard whose size or time of
            change is another one is indexed again. Processes that need the same index share the work.
        rank, world: the number of this process, and how many there are.

    Raises WuerstchenError if no sample is left, or the index can't be written.
    """

    def __init__(
        self,
        urls: Sequence[str],
        folder: str | Path,
        caption_key: str = "",
        filters: Filters = KEEP_ALL,
        rank: int = 0,
        world: int = 1,
    ):
        self.urls, self.caption_key = urls, caption_key
        self._indices = _indices(urls, Path(folder), rank, world)
        self._kept = [np.flatnonzero(filters.keep(index.scores)) for index in self._indices]
        self._starts = [0, *accumulate(map(len, self._kept))]
        self.told = [message for index in self._indices for message in index.told]
        total = sum(len(index.keys) for index in self._indices)
        if not len(self):
            left_out = f"the filters leave out all of {total} samples" if total else "no sample can be read"
            raise WuerstchenError(
                f"{readable(urls[0], 150)}: no shard holds a sample to learn from: {left_out}; "
                f"{'; '.join(readable(message, 100) for message in self.told[:2])}"
            )
        if len(self) < total:
            log.warning("the filters keep %d of %d samples", len(self), total)

    def __len__(self) -> int:
        return self._starts[-1]

    def key(self, i: int) -> str:
        shard, number = self._place(i)
        return f"{self.urls[shard]}/{self._indices[shard].keys[number]}"

    def size(self, i: int) -> Size:
        shard, number = self._place(i)
        height, width = self._indices[shard].sizes[number].tolist()
        return height, width

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        sample = parsed(self._raw(i), self.caption_key)
        return ShardBatch(sample.size, [sample], []).load(0, generator)

    def caption(self, i: int) -> str:
        """The caption, or "" if there is none. Raises OSError or ValueError if it can't be read."""
        return caption_of(self._raw(i, with_picture=False), self.caption_key) or ""

    def stamp(self, i: int) -> str:
        shard, number = self._place(i)
        return f"{self._indices[shard].stamp} {self._indices[shard].spans(number)}"

    def order(self, generator: random.Random) -> list[int]:
        """All samples in the order of an epoch: those of SHUFFLED_SHARDS shards at a time are shuffled."""
        shards = list(range(len(self.urls)))
        generator.shuffle(shards)
        order = []
        for first in range(0, len(shards), SHUFFLED_SHARDS):
            samples = [
                i
                for shard in shards[first : first + SHUFFLED_SHARDS]
                for i in range(self._starts[shard], self._starts[shard + 1])
            ]
            generator.shuffle(samples)
            order += samples
        return order

    def _place(self, i: int) -> tuple[int, int]:
        shard = bisect_right(self._starts, i) - 1
        return shard, int(self._kept[shard][i - self._starts[shard]])

    def _raw(self, i: int, with_picture: bool = True) -> RawSample:
        shard, number = self._place(i)
        spans = self._indices[shard].spans(number)
        url, key = self.urls[shard], self._indices[shard].keys[number]
        with _opened(url) as file:
            return {"__key__": key, "__url__": url} | {
                suffix: b"" if suffix == picture_suffix(spans) and not with_picture else _read(file, span)
                for suffix, span in spans.items()
            }


def are_indexed(urls: Sequence[str]) -> bool:
    """Whether all shards are on a disk and not compressed; those that are missing count as well."""
    return all(map(_is_indexed, urls))


def _is_indexed(url: str) -> bool:
    if local_path(url) is None or not url.lower().endswith(".tar"):
        return False
    try:
        with _opened(url) as file:
            return not file.read(8).startswith(COMPRESSED)
    except (OSError, ValueError):  # told with the index
        return True


def _indices(urls: Sequence[str], folder: Path, rank: int, world: int) -> list[ShardIndex]:
    """The index of each shard. Every process begins at another one, so that those made by others are found."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WuerstchenError(f"{folder}: the index of the shards can't be kept there ({error.strerror})") from error
    first = len(urls) * rank // world
    numbers = [*range(first, len(urls)), *range(first)]
    bar = tqdm(numbers, desc="index of the shards", leave=False, delay=2, disable=rank > 0)
    found = {number: _index(urls[number], folder) for number in bar}
    return [found[number] for number in range(len(urls))]


def _index(url: str, folder: Path) -> ShardIndex:
    """A shard's index, from the folder or made anew."""
    try:
        path = Path(os.path.abspath(local_path(url) or url))
        status = path.stat()
    except OSError as error:
        return _packed(url, "", [], [_unreadable(url, error)])
    stamp = f"{FORMAT} {status.st_size} {status.st_mtime_ns}"
    kept = folder / f"{hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()}.npz"
    index = _load(kept)
    if index is None or index.stamp != stamp:
        index = scan(url, stamp)
        try:
            _save(index, kept)
        except OSError as error:
            raise WuerstchenError(f"{kept}: could not be written ({error.strerror or error})") from error
    return index


def scan(url: str, stamp: str) -> ShardIndex:
    """Reads the headers of a shard's members and pictures, and its JSON."""
    samples, told = [], []
    try:
        with _opened(url) as file:
            for raw in _spans(url, file):
                try:
                    if "__error__" in raw:
                        raise ValueError(raw["__error__"])
                    suffix = picture_suffix(raw)
                    if suffix is None:
                        raise ValueError("there is no picture in it")
                    size = _size(file, raw[suffix])
                except Exception as error:  # a damaged picture raises nearly anything
                    told.append(readable(f"{url}/{raw['__key__']}: {error}"))
                    continue
                content = _read(file, raw["json"]) if "json" in raw else None
                samples.append((raw, size, scores(content, size)))
    except Exception as error:  # a damaged archive raises nearly anything
        told.append(_unreadable(url, error))
    return _packed(url, stamp, samples, told)


def _packed(url: str, stamp: str, samples: list[tuple[RawSample, Size, np.ndarray]], told: list[str]) -> ShardIndex:
    files = [
        [(SUFFIXES.index(suffix), *span) for suffix, span in raw.items() if isinstance(span, Span)]
        for raw, _, _ in samples
    ]
    return ShardIndex(
        stamp,
        [raw["__key__"] for raw, _, _ in samples],
        np.array([row for rows in files for row in rows], np.int64).reshape(-1, 3),
        np.array([0, *accumulate(map(len, files))], np.int64),
        np.array([size for _, size, _ in samples], np.int32).reshape(-1, 2),
        np.array([row for _, _, row in samples], np.float32).reshape(-1, 4),
        told,
    )


def _spans(url: str, file: BinaryIO) -> Generator[RawSample, None, None]:
    """The samples of a shard, with each file's place instead of its content; what is wrong is raised at the end."""

    def opened() -> tarfile.TarFile:
        return tarfile.open(fileobj=file, mode="r:", tarinfo=Header)

    def span(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Span:
        return Span(member.offset_data, member.size)

    failure = yield from joined(grouped(url, opened, span))
    if failure is not None:
        raise failure
    file.seek(-512, os.SEEK_END)
    if any(file.read(512)):
        raise ValueError("it is cut short")


def _size(file: BinaryIO, span: Span) -> Size:
    """(height, width) of a picture in a shard. Raises nearly anything if it is a bad one."""
    try:
        return pictures.size_of(io.BytesIO(_read(file, Span(span.offset, min(HEAD, span.length)))), FORMATS)
    except Exception:
        return pictures.size_of(io.BytesIO(_read(file, span)), FORMATS)


def _opened(url: str) -> BinaryIO:
    path = local_path(url) or url
    check_regular(path)
    return open(path, "rb")


def _read(file: BinaryIO, span: Span) -> bytes:
    file.seek(span.offset)
    return file.read(span.length)


def _unreadable(url: str, error: Exception) -> str:
    return f"{readable(url)}: the shard can't be read to its end ({readable(cause(error), 200)})"


def _save(index: ShardIndex, path: Path) -> None:
    texts = {
        name: np.frombuffer("\0".join(lines).encode("utf-8", "surrogatepass"), np.uint8)
        for name, lines in (("stamp", [index.stamp]), ("keys", index.keys), ("told", index.told))
    }
    arrays = {name: getattr(index, name) for name in ("files", "starts", "sizes", "scores")}
    with replacing(path, sync=False) as partial:  # a damaged file is found by its checksums
        with open(partial, "wb") as file:
            np.savez(file, **{**texts, **arrays})


def _load(path: Path) -> ShardIndex | None:
    """A kept index, or None if there is none or it is damaged."""
    try:
        check_regular(path)
        with np.load(path, allow_pickle=False) as kept:
            texts = {name: kept[name].tobytes().decode("utf-8", "surrogatepass") for name in ("stamp", "keys", "told")}
            arrays = {name: kept[name] for name in ("files", "starts", "sizes", "scores")}
    except Exception:  # a damaged file raises nearly anything
        return None
    lines = {name: text.split("\0") if text else [] for name, text in texts.items()}
    if not len(lines["keys"]) == len(arrays["sizes"]) == len(arrays["scores"]) == len(arrays["starts"]) - 1:
        return None
    return ShardIndex(texts["stamp"], lines["keys"], told=lines["told"], **arrays)
