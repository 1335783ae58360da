"""Sets of pictures, read once: folders or shards."""

import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ...training.data.shards import Shards, expand, is_shard
from ...training.data.sources import FORMATS, FolderSource
from ...util import pictures
from ...util.errors import WuerstchenError, readable

Scorer = Callable[[list[Tensor], list[str]], Tensor]  # B images (3, H, W) in [0, 1] and their captions -> (B, ...)

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    key: str
    caption: str
    image: Tensor  # (3, H, W) in [0, 1]


@dataclass
class Scored:
    """What scorers gave for each picture of a set, by the scorers' names, (N, ...) each."""

    keys: list[str]
    captions: list[str]
    values: dict[str, Tensor]
    skipped: list[str] = field(default_factory=list)  # pictures that can't be read, and why


def samples(data: str | Path, skipped: list[str]) -> Iterator[Sample]:
    """Every good picture of a folder, in the order of their names, or of shards; the others are added to `skipped`.

    Keys have no suffix: `a/cat` for `a/cat.png`. Captions are found as in training, and "" if there is none.

    Raises WuerstchenError if there is no such set.
    """
    if is_folder(data):
        source = FolderSource(data)
        for i in range(len(source)):
            try:
                image, caption = source.load(i, random.Random(0))
            except Exception as error:  # a damaged picture raises nearly anything
                skipped.append(readable(f"{source.key(i)}: {error}"))
                continue
            yield Sample(os.path.splitext(source.key(i))[0], caption, image)
        return
    for sample in Shards(expand(data), [], 1, 0).once(skipped):
        try:
            image = rearrange(pictures.decode(io.BytesIO(sample.picture), FORMATS), "h w c -> c h w")
        except Exception as error:
            skipped.append(readable(f"{sample.key}: {error}"))
            continue
        yield Sample(sample.key, sample.caption, image)


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
) -> Scored:
    """Reads a set once, `batch` pictures at a time, and gives them to each of the scorers.

    Args:
        limit: number of pictures after which to stop; the first ones are taken.
        prompts: instead of the captions; one for each picture, in the order of their names.

    Raises:
        WuerstchenError: there is no such set, nothing in it can be read, or there are not as many prompts as pictures.
    """
    found = Scored([], [], {})
    values: dict[str, list[Tensor]] = {name: [] for name in scorers}
    stream = islice(samples(data, found.skipped), limit)
    with tqdm(desc=readable(data, 40), unit="picture", leave=False) as bar:
        while some := list(islice(stream, batch)):
            captions = [one.caption for one in some]
            if prompts is not None:
                captions = prompts[len(found.keys) : len(found.keys) + len(some)]
                if len(captions) < len(some) or found.skipped:
                    raise _unmatched(data, prompts, found.skipped)
            for name, scorer in scorers.items():
                values[name].append(scorer([one.image for one in some], captions))
            found.keys += [one.key for one in some]
            found.captions += captions
            bar.update(len(some))
    if not found.keys:
        raise WuerstchenError(f"{readable(data, 150)}: no picture can be read; {' '.join(found.skipped[:1])}")
    if prompts is not None and limit is None and len(prompts) != len(found.keys):
        raise _unmatched(data, prompts, found.skipped)
    if found.skipped:
        log.warning("%s: %d skipped, such as %s", readable(data, 150), len(found.skipped), found.skipped[0])
    found.values = {name: torch.cat(parts) for name, parts in values.items()}
    return found


def _unmatched(data: str | Path, prompts: list[str], skipped: list[str]) -> WuerstchenError:
    reason = f"{skipped[0]} can't be read" if skipped else "there are more or fewer pictures"
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
