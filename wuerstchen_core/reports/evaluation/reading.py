"""Sets of pictures, read once: folders or shards."""

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from PIL import UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ...bulk.plan import Share
from ...training.data.files import read_regular
from ...training.data.shards import Shards, expand, is_shard
from ...training.data.sources import FORMATS, FolderSource
from ...util import pictures
from ...util.errors import WuerstchenError, readable
from .kept import Kept, Row, Values, hash_of_texts
from .processes import ALONE, gathered

Scorer = Callable[[list[Tensor], list[str]], Tensor]  # B images (3, H, W) in [0, 1] and their captions -> (B, ...)
LARGEST = 1 << 30  # bytes of a picture's file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A picture that is not read yet. Its key has no suffix: `a/cat` for `a/cat.png`; its name is for messages."""

    key: str
    name: str
    caption: str
    content: Callable[[], bytes]


class Sample(NamedTuple):
    key: str
    image: Tensor  # (3, H, W) in [0, 1]


@dataclass
class Scored:
    """What scorers gave for each picture of a set, by the scorers' names, (N, ...) each."""

    keys: list[str]
    captions: list[str]
    values: dict[str, Tensor]
    skipped: list[str] = field(default_factory=list)  # pictures that can't be read, and why


def entries(data: str | Path) -> tuple[Iterator[Entry | str], int | None]:
    """The pictures of a folder, in the order of their names, or of shards; and their number, where it is known.

    In the place of one that can't be read is what is wrong with it. Captions are found as in training, and "" if there
    is none.

    Raises WuerstchenError if there is no such set.
    """
    if is_folder(data):
        source = FolderSource(data)
        return _of_folder(source), len(source)
    return _of_shards(Shards(expand(data), [], 1, 0)), None


def _of_folder(source: FolderSource) -> Iterator[Entry | str]:
    for i, name in enumerate(source.keys):
        try:
            caption = source.caption(i)
        except Exception as error:  # of a damaged file of captions
            yield readable(f"{name}: {error}")
            continue
        path = source.folder / name
        yield Entry(os.path.splitext(name)[0], name, caption, partial(read_regular, path, LARGEST))


def _of_shards(shards: Shards) -> Iterator[Entry | str]:
    skipped: list[str] = []
    for sample in shards.once(skipped):
        yield from skipped
        skipped.clear()
        yield Entry(sample.key, sample.key, sample.caption, partial(bytes, sample.picture))
    yield from skipped


def decoded(content: bytes) -> Tensor:
    """A picture's file -> (3, H, W) in [0, 1]. Raises nearly anything if it is damaged."""
    try:
        return rearrange(pictures.decode(io.BytesIO(content), FORMATS), "h w c -> c h w")
    except UnidentifiedImageError as error:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from error


def samples(data: str | Path) -> Iterator[Sample]:
    """Every good picture of a set. Raises WuerstchenError if there is no such set."""
    for entry in entries(data)[0]:
        if isinstance(entry, Entry):
            try:
                image = decoded(entry.content())
            except Exception:  # a damaged picture raises nearly anything
                continue
            yield Sample(entry.key, image)


def is_folder(data: str | Path) -> bool:
    return os.path.isdir(data) or not is_shard(str(data))


def check_set(data: str | Path) -> None:
    """Raises WuerstchenError unless this names a folder that exists, or shards: before anything is computed."""
    if not os.path.isdir(data):
        if not is_shard(str(data)):
            raise WuerstchenError(f"{readable(data)}: there is no such folder, and it is no shard (.tar)")
        expand(data)


def score(
    data: str | Path,
    scorers: Mapping[str, Scorer],
    batch: int,
    limit: int | None = None,
    prompts: list[str] | None = None,
    kept: Kept | None = None,
    share: Share = ALONE,
) -> Scored:
    """Reads a set once, `batch` pictures at a time, and gives them to each of the scorers.

    Args:
        limit: number of pictures after which to stop; the first ones are taken, whether they can be read or not.
        prompts: instead of the captions; one for each picture, in the order of their names.
        kept: has the values of the batches of earlier runs, and keeps those of this one.
        share: this process's part of the batches, which are the same whatever the number of processes. All processes
            get the values of all pictures.

    Raises:
        WuerstchenError: there is no such set, nothing in it can be read, or there are not as many prompts as pictures.
    """
    stream, count = entries(data)
    if count is not None and limit is not None:
        count = min(count, limit)
    if prompts is not None and (len(prompts) < (count or 0) or limit is None and len(prompts) != count):
        raise _unmatched(data, prompts, f"there are {count}")
    wanted = islice(stream, limit)

    def own() -> list[tuple[int, Scored]]:
        done = []
        with tqdm(desc=readable(data, 40), total=count, unit="picture", leave=False, disable=share.rank > 0) as bar:
            for number, some in enumerate(iter(lambda: list(islice(wanted, batch)), [])):
                if share.has(number):
                    captions = None if prompts is None else prompts[number * batch :]
                    scored = _scored(some, scorers, captions, kept)
                    if prompts is not None and scored.skipped:
                        raise _unmatched(data, prompts, f"{scored.skipped[0]} can't be read")
                    done.append((number, scored))
                bar.update(len(some))
        return done

    parts = [part for _, part in sorted(gathered(share, own), key=lambda one: one[0])]
    found = Scored([], [], {})
    for part in parts:
        found.keys += part.keys
        found.captions += part.captions
        found.skipped += part.skipped
    if not found.keys:
        raise WuerstchenError(f"{readable(data, 150)}: no picture can be read; {' '.join(found.skipped[:1])}")
    if found.skipped and share.rank == 0:
        log.warning("%s: %d skipped, such as %s", readable(data, 150), len(found.skipped), found.skipped[0])
    found.values = {name: torch.cat([part.values[name] for part in parts if part.keys]) for name in scorers}
    return found


def _scored(
    batch: Sequence[Entry | str], scorers: Mapping[str, Scorer], prompts: Sequence[str] | None, kept: Kept | None
) -> Scored:
    """What the scorers give for a batch's good pictures; `prompts` in the place of their captions."""
    skipped: list[str] = []
    rows: list[Row] = []
    names: list[str] = []
    for i, entry in enumerate(batch):
        try:
            if isinstance(entry, str):
                raise ValueError(entry)
            rows.append(Row(entry.key, entry.caption if prompts is None else prompts[i], entry.content()))
            names.append(entry.name)
        except (OSError, ValueError) as error:
            skipped.append(readable(entry if isinstance(entry, str) else f"{entry.name}: {error}"))
    found = {} if kept is None else {name: kept.find(name, rows) for name in scorers}
    damaged = next((values.damaged for values in found.values() if values is not None), None)
    images: list[Tensor] = []
    if damaged is None or None in found.values():
        damaged = {}
        for i, row in enumerate(rows):
            try:
                images.append(decoded(row.content))
            except Exception as error:  # a damaged picture raises nearly anything
                damaged[i] = readable(f"{names[i]}: {error}")
    good = [row for i, row in enumerate(rows) if i not in damaged]
    captions = [row.caption for row in good]
    values = {}
    for name, scorer in scorers.items() if good else ():
        known = found.get(name)
        values[name] = scorer(images, captions) if known is None else known.values
        if kept is not None and known is None:
            kept.add(name, rows, Values(values[name], damaged))
    return Scored([row.key for row in good], captions, values, [*skipped, *damaged.values()])


def _unmatched(data: str | Path, prompts: list[str], reason: str) -> WuerstchenError:
    return WuerstchenError(
        f"{readable(data, 150)}: {len(prompts)} prompts need as many pictures, one each in the order of their names, "
        f"but {readable(reason, 150)}"
    )


def check_captions(data: str | Path, found: Scored) -> None:
    """Raises WuerstchenError unless each picture has a caption, without which it would be scored against nothing."""
    bare = [key for key, caption in zip(found.keys, found.captions, strict=True) if not caption]
    if bare:
        raise WuerstchenError(
            f"{readable(data, 150)}: {len(bare)} of {len(found.keys)} pictures have no caption, such as "
            f"{readable(bare[0], 100)}: add {readable(os.path.basename(bare[0]), 50)}.txt, or give --prompts FILE"
        )


def hash_of_set(data: str | Path) -> str:
    """Changes when a picture does, or its name. Raises WuerstchenError if there is no such set."""
    stream, _ = entries(data)
    texts = []
    for entry in stream:
        try:
            told = entry if isinstance(entry, str) else f"{entry.name} {hashlib.sha256(entry.content()).hexdigest()}"
        except (OSError, ValueError) as error:
            told = str(error)
        texts.append(told)
    return hash_of_texts(texts)


def read_captions(folder: Path) -> list[str]:
    """The captions of a folder's pictures, in the order of their names. Raises WuerstchenError if one has none."""
    source, captions = FolderSource(folder), []
    for i, name in enumerate(source.keys):
        try:
            caption, reason = source.caption(i), "has no caption"
        except Exception as error:  # of a damaged file of captions
            caption, reason = "", str(error)
        if not caption:
            raise WuerstchenError(f"{readable(folder, 150)}: {readable(name, 100)}: {readable(reason, 150)}")
        captions.append(caption)
    return captions


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, without empty ones at its end. Raises WuerstchenError if it is none, or empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WuerstchenError(f"{path}: no text file in UTF-8 that can be read ({readable(error, 150)})") from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise WuerstchenError(f"{path}: there is no prompt in it, one per line")
    return lines
