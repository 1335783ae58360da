"""What the batches of a run depend on: kept in its checkpoints, so that a change is told when it goes on."""

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.options import DataOptions
from ..data.shard_index import are_indexed
from ..data.shards import expand, is_shard
from ..data.sources import FolderSource, Source

log = logging.getLogger(__name__)

LOOKED_AT = 20_000  # samples whose sizes and captions are looked at; the names are all


def facts(data: DataOptions) -> dict[str, Any]:
    """Name -> what it is now. Raises WuerstchenError where there is no such data."""
    source = data.source
    kept: dict[str, Any] = {"size": data.size, "buckets": data.buckets, "batch": data.batch, "held_out": data.held_out}
    if isinstance(source, str) and is_shard(source) and not os.path.isdir(source):
        urls = expand(source)
        bounds = [data.min_side, data.min_aesthetic, data.max_watermark, data.max_unsafe]
        kept |= {"data": _of_shards(urls), "filters": bounds}
        return kept if are_indexed(urls) else kept | {"workers": max(1, data.workers)}
    return kept | {"data": _of_source(FolderSource(source, data.caption_key) if isinstance(source, str) else source)}


def tell_changes(folder: Path, step: int, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns of what has changed since the checkpoint of a step, and says whether the batches have."""
    changed = [name for name in now if before.get(name) != now[name]]
    if not changed:
        return
    told = ", ".join(f"{name} ({str(before.get(name, 'unknown'))[:60]}, now {now[name]})" for name in changed)
    total = [kept.get("batch", 0) * kept.get("processes", 0) for kept in (before, now)]
    if "workers" not in now and total[0] == total[1] and set(changed) <= {"batch", "processes"}:
        effect = "its batches are still those that it would have had"
    elif "workers" not in now and set(changed) <= {"batch", "processes", "accumulate"}:
        effect = "its batches have another size, and each sample is still seen once an epoch"
    else:
        effect = "its batches are no longer exactly those that it would have had"
    log.warning("%s: changed since its checkpoint of step %d: %s; %s", folder, step, told, effect)


def _of_source(source: Source) -> str:
    count = len(source)
    every = -(-count // LOOKED_AT)
    seen = [source.key(i) for i in range(count)]
    if isinstance(source, FolderSource):
        seen += [_about(source, i) for i in range(0, count, every)]
    return f"{count} pictures, {_digest(seen)}"


def _about(source: FolderSource, i: int) -> str:
    """The size of a picture's file, and its caption."""
    try:
        return f"{(source.folder / source.key(i)).stat().st_size} {source.caption(i)}"
    except (OSError, ValueError) as error:  # a bad sample: it is told when it is loaded
        return type(error).__name__


def _of_shards(urls: list[str]) -> str:
    sizes = [os.path.getsize(url) if os.path.isfile(url) else 0 for url in urls]
    return f"{len(urls)} shards, {_digest([*urls, *map(str, sizes)])}"


def _digest(texts: list[str]) -> str:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "backslashreplace"), digest_size=6).hexdigest()
