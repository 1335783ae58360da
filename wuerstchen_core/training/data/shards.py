"""Shards: tar files of pictures with captions, local or not, read as streams with the webdataset library.

A shard is in webdataset's format: the files of a sample share their name up to the first dot and follow one another;
the picture is .jpg, .jpeg, .png or .webp, the caption .txt, or "caption" in .json.
"""

import hashlib
import io
import json
import random
import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from einops import rearrange
from torch import Tensor

from ...util import pictures
from ...util.errors import WuerstchenError
from .buckets import Size, nearest_size
from .sources import FORMATS, SUFFIXES, read_caption

SHUFFLED = 512  # samples, still encoded, from which the next one is drawn


@dataclass(frozen=True)
class ShardSample:
    key: str
    caption: str
    size: Size
    picture: bytes


@dataclass(frozen=True)
class ShardBatch:
    """Samples of one bucket, not decoded yet: a `FixedSource` of them, and what was skipped before they came together.

    Raises what Pillow raises where a picture can't be decoded.
    """

    bucket: Size
    samples: list[ShardSample]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, i: int) -> str:
        return self.samples[i].key

    def size(self, i: int) -> Size:
        return self.samples[i].size

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        picture = pictures.decode(io.BytesIO(self.samples[i].picture), FORMATS)
        return rearrange(picture, "h w c -> c h w"), self.samples[i].caption

    def caption(self, i: int) -> str:
        return self.samples[i].caption

    def stamp(self, i: int) -> str:
        return hashlib.blake2b(self.samples[i].picture, digest_size=32).hexdigest()


@dataclass(frozen=True)
class Shards:
    """The tar files at `urls`, as streams of batches that never end; of `buckets` sizes, `batch` samples each."""

    urls: Sequence[str]
    buckets: Sequence[Size]
    batch: int
    seed: int

    def batches(self, stream: int, streams: int) -> Iterator[ShardBatch]:
        """The batches of one of several streams, which together see every sample once an epoch.

        They follow from the seed alone. Bad samples and shards are skipped. Raises WuerstchenError where a stream meets
        nothing good in so many epochs that it has tried everything.
        """
        waiting = defaultdict(list)
        skipped: list[str] = []
        barren = 0
        for epoch in count():
            found = False
            samples = self._samples(epoch, stream, streams, skipped)
            for raw in _shuffled(samples, random.Random(f"buffer {self.seed} {epoch} {stream}")):
                try:
                    sample = _parsed(raw)
                except Exception as error:  # a damaged picture raises nearly anything
                    skipped.append(f"{_key(raw)}: {error}")
                    continue
                found = True
                bucket = nearest_size(self.buckets, sample.size)
                waiting[bucket].append(sample)
                if len(waiting[bucket]) == self.batch:
                    yield ShardBatch(bucket, waiting.pop(bucket), skipped[:])
                    skipped.clear()
            barren = 0 if found else barren + 1
            if barren == streams:
                raise WuerstchenError(f"no shard holds a sample that can be read; {'; '.join(skipped[:3])}")

    def _samples(self, epoch: int, stream: int, streams: int, skipped: list[str]) -> Iterator[dict]:
        """A stream's raw samples of an epoch. It gets whole shards, or single samples where there are too few shards;
        from epoch to epoch they go round, so that each stream gets each of them in as many epochs as there are streams.
        """
        whole = len(self.urls) >= streams
        order = list(range(len(self.urls)))
        random.Random(f"epoch {self.seed} {epoch}").shuffle(order)
        for shard in order:
            turn = (shard + epoch) % streams == stream
            if whole and not turn:
                continue
            try:
                for number, sample in enumerate(_tar_samples(self.urls[shard])):
                    if whole or (shard + number + epoch) % streams == stream:
                        yield sample
            except Exception as error:  # a damaged archive raises nearly anything, and so does what opens urls
                if turn:
                    skipped.append(f"{self.urls[shard]}: the shard can't be read to its end ({_reason(error)})")


def is_shard(url: str) -> bool:
    return bool(re.match(r"\w+:", url) or re.search(r"\.(tar|tgz|tar\.\w+)$", url))


def expand(data: str | Path | Sequence[str | Path]) -> list[str]:
    """Urls and paths of shards, with webdataset's braces (`{000..009}.tar`) and `::` -> one for each shard.

    Raises WuerstchenError where webdataset is missing, braces don't match, or there is no shard among them.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise WuerstchenError("shards need webdataset: pip install webdataset") from error
    patterns = [data] if isinstance(data, (str, Path)) else data
    try:
        urls = [url for pattern in patterns for url in expand_urls(str(pattern))]
    except (ValueError, AssertionError) as error:
        raise WuerstchenError(f"{data}: not the names of shards ({error})") from error
    for url in urls:
        if not is_shard(url):
            raise WuerstchenError(f"{url}: neither a folder nor a shard (a .tar file, or a url such as s3://…)")
        if url.startswith("s3:") and not shutil.which("aws"):
            raise WuerstchenError(f"{url}: reading from s3 needs the command `aws`: pip install awscli")
    if not urls:
        raise WuerstchenError("there is no shard: name .tar files, or a folder of pictures")
    return urls


def _tar_samples(url: str) -> Iterator[dict]:
    """The raw samples of a shard: all that can be read, before what is wrong with it is raised."""
    from webdataset.gopen import gopen
    from webdataset.handlers import ignore_and_continue
    from webdataset.tariterators import group_by_keys, tar_file_expander

    opened = gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3:") else url)
    stream = _Watched(getattr(opened, "stream", opened))  # a pipe itself, whose own `read` drops all when it fails
    files = tar_file_expander(
        [{"url": url, "stream": stream}],
        select_files=lambda name: name.lower().endswith((*SUFFIXES, ".txt", ".json")),
    )
    yield from group_by_keys(files, handler=ignore_and_continue)
    while stream.read(1 << 20):  # a pipe's command must come to its end before it can say how it went
        pass
    opened.close()  # raises where the command failed
    if stream.is_cut_short:
        raise ValueError("it is cut short")


class _Watched:
    """A stream that knows afterwards whether it was a whole archive: one cut between two files looks like one."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.start, self.end = b"", b""

    def read(self, size: int) -> bytes:
        chunk = self.stream.read(size)
        self.start = self.start or chunk[:512]
        self.end = (self.end + chunk)[-512:]
        return chunk

    @property
    def is_cut_short(self) -> bool:
        """Whether a tar file, which ends in zeros, does not. Compressed ones have checks of their own."""
        return self.start[257:262] == b"ustar" and any(self.end)


def _shuffled(samples: Iterator[dict], generator: random.Random) -> Iterator[dict]:
    from webdataset import shuffle

    return shuffle(SHUFFLED, initial=SHUFFLED, rng=generator)(samples)


def _parsed(raw: dict) -> ShardSample:
    """Decodes nothing but the picture's header. Raises nearly anything where the sample is a bad one."""
    suffix = next((suffix for suffix in SUFFIXES if suffix[1:] in raw), None)
    if suffix is None:
        raise ValueError("there is no picture in it")
    picture = raw[suffix[1:]]
    return ShardSample(_key(raw), _caption(raw), pictures.size_of(io.BytesIO(picture), FORMATS), picture)


def _caption(raw: dict) -> str:
    if "txt" in raw:
        return read_caption(raw["txt"])
    caption = json.loads(raw.get("json", b"{}")).get("caption") or ""
    if not isinstance(caption, str):
        raise ValueError("its caption is no text")
    return caption.strip()


def _reason(error: Exception) -> str:
    """What is wrong, without the streams and arguments that webdataset adds to an exception."""
    told = str(getattr(error, "strerror", None) or next(iter(error.args), type(error).__name__))
    status = re.search(r": (exit -?\d+) \(read\)", told)
    return f"its command ended with {status[1]}" if status else told.split(" @ <")[0]


def _key(raw: dict) -> str:
    return f"{raw['__url__']}/{raw['__key__']}"
