"""Shards: tar files of pictures with captions, local or not, read as streams.

A shard is in webdataset's format: the files of a sample share their name up to the first dot; the picture is .jpg,
.jpeg, .png or .webp, the caption .txt, .caption or in .json. They should follow one another: a picture waits for its
caption only as long as PENDING_BYTES last. webdataset's library expands names and opens urls.
"""

import hashlib
import io
import random
import re
import shlex
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

from einops import rearrange
from torch import Tensor

from ...util import pictures
from ...util.errors import WuerstchenError, readable
from . import captions
from .buckets import Size, nearest_size
from .files import check_regular, is_leftover
from .filters import KEEP_ALL, Filters, scores
from .sources import FORMATS, SUFFIXES

SHUFFLED = 512  # encoded samples from which the next one is drawn, at most
SHUFFLED_BYTES = 256 << 20  # and their size, at most
PENDING_BYTES = 128 << 20  # pictures of a shard that wait for captions which don't follow them, at most
WAITING_BYTES = 2 << 30  # encoded samples that wait for a batch of their bucket, at most, beside WAITING_EACH
WAITING_EACH = 4 << 20  # bytes for each of the samples that can wait
LARGEST_PICTURE = 64 << 20  # bytes of a picture's file
LARGEST_HEADER = 1 << 20  # bytes of a tar member's long name and other attributes
SEARCHED = 1000  # samples among which there must be a caption
MOST_SHARDS = 1_000_000

ATTRIBUTES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
HEADER_BYTES = 512  # that each sample has in a tar file at least
CAPTION_SUFFIXES = (*captions.TEXT_SUFFIXES, captions.JSON_SUFFIX)
READ = {f"{picture}{caption}"[1:] for picture in ("", *SUFFIXES) for caption in ("", *CAPTION_SUFFIXES)} - {""}

RawSample = dict[str, Any]  # suffix -> bytes, and "__key__", "__url__"; "__error__" if one of its files can't be used


@dataclass(frozen=True)
class ShardSample:
    key: str
    caption: str
    size: Size
    picture: bytes


@dataclass(frozen=True)
class ShardBatch:
    """Samples of one bucket, not decoded yet: a `FixedSource` of them, and what was skipped before they came together.

    `load` raises what Pillow raises if a picture can't be decoded.
    """

    bucket: Size
    samples: list[ShardSample]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def nbytes(self) -> int:
        return sum(len(sample.picture) for sample in self.samples)

    def key(self, i: int) -> str:
        return self.samples[i].key

    def size(self, i: int) -> Size:
        return self.samples[i].size

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        picture = pictures.decode(io.BytesIO(self.samples[i].picture), FORMATS)
        return rearrange(picture, "h w c -> c h w"), self.samples[i].caption

    def caption(self, i: int, generator: random.Random | None = None) -> str:
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
    caption_key: str = ""
    filters: Filters = KEEP_ALL

    def batches(self, stream: int, streams: int) -> Iterator[ShardBatch]:
        """The batches of one of several streams, which together see every sample once per epoch.

        They follow from the seed alone. Bad samples and shards are skipped. Raises WuerstchenError if a stream has
        tried everything and found nothing that can be read.
        """
        waiting: dict[Size, list[ShardSample]] = defaultdict(list)
        waiting_bytes, most = 0, WAITING_BYTES + WAITING_EACH * self.batch * len(self.buckets)
        skipped: list[str] = []
        barren = 0
        for epoch in count():
            found = False
            samples = self._samples(epoch, stream, streams, skipped)
            for raw in _shuffled(samples, random.Random(f"buffer {self.seed} {epoch} {stream}")):
                try:
                    sample = parsed(raw, self.caption_key)
                except Exception as error:  # a damaged picture raises nearly anything
                    skipped.append(readable(f"{_key(raw)}: {error}"))
                    continue
                if not self.filters.keep(scores(raw.get("json"), sample.size)):
                    continue
                found = True
                bucket = nearest_size(self.buckets, sample.size)
                waiting[bucket].append(sample)
                waiting_bytes += len(sample.picture)
                if len(waiting[bucket]) == self.batch:
                    batch = ShardBatch(bucket, waiting.pop(bucket), skipped[:])
                    skipped.clear()
                    waiting_bytes -= batch.nbytes
                    yield batch
                elif waiting_bytes > most:
                    raise WuerstchenError(
                        f"{waiting_bytes >> 20} MiB of pictures wait for others of their aspect ratio: choose a "
                        "smaller --batch or --buckets false"
                    )
            barren = 0 if found else barren + 1
            if barren == streams:
                filtered = " and passes the filters" if self.filters.are_set else ""
                raise WuerstchenError(f"no shard holds a sample that can be read{filtered}; {_first(skipped)}")

    def once(self, skipped: list[str]) -> Iterator[ShardSample]:
        """Every good sample once, by its key in its shard; what was skipped, and why, is added to `skipped`."""
        with closing(self._samples(0, 0, 1, skipped)) as samples:
            for raw in samples:
                try:
                    sample = replace(parsed(raw, self.caption_key), key=raw["__key__"])
                except Exception as error:  # a damaged picture raises nearly anything
                    skipped.append(readable(f"{_key(raw)}: {error}"))
                    continue
                yield sample

    def check_captions(self, required: bool) -> None:
        """Raises WuerstchenError if captions are required and none of the first SEARCHED samples has one."""
        if not required:
            return
        seen = 0
        with closing(self._samples(0, 0, 1, [])) as samples:
            for raw in islice(samples, SEARCHED):
                seen += 1
                with suppress(Exception):  # a bad sample: it is skipped, and reported, when its turn comes
                    if caption_of(raw, self.caption_key):
                        return
        if seen:
            raise WuerstchenError(
                f"{readable(self.urls[0], 150)}: none of the first {seen} pictures in the shards has a caption (.txt, "
                ".caption or in .json, its key named by --caption-key); --allow-empty-captions true trains without "
                "captions"
            )

    def _samples(self, epoch: int, stream: int, streams: int, skipped: list[str]) -> Generator[RawSample, None, None]:
        """A stream's raw samples of an epoch: whole shards, or single samples if there are too few shards.

        They rotate from epoch to epoch, so that each stream gets each of them once in as many epochs as there are
        streams.
        """
        whole = len(self.urls) >= streams
        order = list(range(len(self.urls)))
        random.Random(f"epoch {self.seed} {epoch}").shuffle(order)
        for shard in order:
            turn = (shard + epoch) % streams == stream
            if whole and not turn:
                continue
            try:
                with closing(_tar_samples(self.urls[shard])) as samples:
                    for number, sample in enumerate(samples):
                        if whole or (shard + number + epoch) % streams == stream:
                            yield sample
            except Exception as error:  # a damaged archive raises nearly anything, and so does opening a url
                if turn:
                    reason = readable(cause(error), 200)
                    skipped.append(f"{readable(self.urls[shard])}: the shard can't be read to its end ({reason})")


def is_shard(url: str) -> bool:
    """Whether this names a shard: a url (`C:` is a drive, not a scheme) or a tar file."""
    return bool(_scheme(url) or re.search(r"\.(tar|tgz|tar\.\w+)$", url, re.IGNORECASE))


def expand(data: str | Path | Sequence[str | Path]) -> list[str]:
    """Urls and paths of shards, with braces (`{000..009}.tar`) and `::` as webdataset has them -> one for each shard.

    Raises WuerstchenError if webdataset can't be imported, braces don't match, or a name is not that of a shard.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise WuerstchenError(
            f"shards need webdataset 1.0.2 or later, which could not be imported ({readable(error)}): "
            "pip install webdataset"
        ) from error
    given = [data] if isinstance(data, (str, Path)) else data
    urls = []
    for pattern in "::".join(map(str, given)).split("::") if given else ():
        try:
            _check_count(pattern)
            # In a path they are separators, which webdataset would take for escapes.
            urls += expand_urls(pattern if _scheme(pattern) == "pipe" else pattern.replace("\\", "\\\\"))
        except (ValueError, AssertionError) as error:
            raise WuerstchenError(f"{readable(pattern)}: not the names of shards ({readable(error, 150)})") from error
    for url in urls:
        if not is_shard(url):
            raise WuerstchenError(
                f"{readable(url)}: neither a folder nor a shard (a .tar file, or a url such as s3://...)"
            )
        if url.startswith("s3:") and not shutil.which("aws"):
            raise WuerstchenError(f"{readable(url)}: reading from s3 needs the command `aws`: pip install awscli")
    if not urls:
        raise WuerstchenError("there is no shard: name .tar files, or a folder of pictures")
    return urls


def _check_count(pattern: str) -> None:
    total = 1
    for group in re.findall(r"\{([^{}]*)\}", pattern):
        ends = re.match(r"(-?\d+)\.\.(-?\d+)", group)
        total *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else group.count(",") + 1
    if total > MOST_SHARDS:
        raise ValueError(f"more than {MOST_SHARDS} of them")


def _scheme(url: str) -> str:
    """The scheme of a url in lower case; "" for a path, with a drive's letter or without."""
    scheme = re.match(r"([A-Za-z][\w+.-]+):", url)
    return scheme[1].lower() if scheme else ""


def _opened(url: str) -> Any:
    """A binary file, or webdataset's pipe from a command."""
    from webdataset.gopen import gopen

    path = local_path(url)
    if path is not None:
        check_regular(path)
        return open(path, "rb")
    return gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if _scheme(url) == "s3" else url)


def local_path(url: str) -> str | None:
    """The path of a shard on a disk, or None for any other url."""
    if _scheme(url) not in ("", "file"):
        return None
    path = re.sub(r"^file:(//(localhost)?(?=/))?", "", url, flags=re.IGNORECASE)
    return re.sub(r"^/+(?=[A-Za-z]:[/\\])", "", path)  # file:///C:/data


def _tar_samples(url: str) -> Generator[RawSample, None, None]:
    """The raw samples of a shard. What is wrong with the shard is raised after all that can be read of it."""
    opened = _opened(url)
    try:
        stream = _Watched(getattr(opened, "stream", opened))  # of a pipe itself, whose own `read` loses the last bytes
        failure = yield from joined(grouped(url, lambda: _archive(stream)))
        if failure is not None:
            raise failure
        while stream.read(1 << 20):  # a pipe's command must come to its end before its status is known
            pass
        if stream.is_cut_short:
            raise ValueError("it is cut short")
    except BaseException:
        with suppress(Exception):
            opened.close()
        raise
    opened.close()  # raises if the command failed


def _archive(stream: "_Watched") -> tarfile.TarFile:
    # A stream is only read.
    return tarfile.open(fileobj=stream, mode="r|*", tarinfo=Header)  # type: ignore[call-overload]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # of a regular file
    return file.read()


def grouped(
    url: str,
    opened: Callable[[], tarfile.TarFile],
    content: Callable[[tarfile.TarFile, tarfile.TarInfo], Any] = _content,
) -> Iterator[RawSample | Exception]:
    """The files of an archive by sample, as far as they follow one another, and at the end what is wrong with it."""
    sample: RawSample = {}
    try:
        with opened() as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # which it would keep for ever
                if not (member.isreg() and _is_data(member.name)):
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, suffix = folder + slash + stem, suffix.lower()
                if key != sample.get("__key__"):
                    if sample:
                        yield sample
                    sample = {"__key__": key, "__url__": url}
                largest = LARGEST_PICTURE if f".{suffix}" in SUFFIXES else captions.LARGEST
                if suffix in sample or suffix not in READ:
                    continue
                if member.size > largest:
                    sample["__error__"] = f".{suffix} has {member.size} bytes, more than {largest}"
                else:
                    sample[suffix] = content(archive, member)
    except Exception as error:  # a damaged archive raises nearly anything; the sample at hand may lack files
        yield error
        return
    if sample:
        yield sample


def joined(samples: Iterator[RawSample | Exception]) -> Generator[RawSample, None, Exception | None]:
    """Samples with their captions, also those whose files lie apart; returns the exception at the end, or None.

    What lacks its other half waits for it, PENDING_BYTES of it.
    """
    pending: dict[str, RawSample] = {}
    size = 0
    failure: Exception | None = None
    for sample in samples:
        if isinstance(sample, Exception):
            failure = sample
            break
        other = pending.pop(sample["__key__"], None)
        if other is not None:
            size -= _bytes(other)
            if _has_picture(other) and _has_picture(sample):
                yield other
            else:
                sample = {**other, **sample}
        if "__error__" in sample or (_has_picture(sample) and _has_caption(sample)):
            yield sample
            continue
        pending[sample["__key__"]] = sample
        size += _bytes(sample)
        while size > PENDING_BYTES:
            oldest = pending.pop(next(iter(pending)))
            size -= _bytes(oldest)
            yield oldest
    yield from pending.values()
    return failure


class Header(tarfile.TarInfo):
    """The header of a tar member, with a bound on its attributes (pax, long names): tarfile reads them whole."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.type in ATTRIBUTES and header.size > LARGEST_HEADER:
            raise ValueError(f"it has a header of {header.size} bytes")
        return header


class _Watched:
    """A stream that knows afterwards whether it was a whole archive: one that is cut between two files looks whole."""

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
        """Whether a tar file doesn't end in zeros, as it should. Compressed ones have checks of their own."""
        return self.start[257:262] == b"ustar" and any(self.end)


def _shuffled(samples: Iterator[RawSample], generator: random.Random) -> Iterator[RawSample]:
    """The samples in a random order, each drawn from a buffer of SHUFFLED samples or SHUFFLED_BYTES."""
    buffer: list[RawSample] = []
    size = 0

    def draw() -> RawSample:
        nonlocal size
        i = generator.randint(0, len(buffer) - 1)
        buffer[i], buffer[-1] = buffer[-1], buffer[i]
        sample = buffer.pop()
        size -= _bytes(sample)
        return sample

    for sample in samples:
        buffer.append(sample)
        size += _bytes(sample)
        while buffer and (len(buffer) >= SHUFFLED or size > SHUFFLED_BYTES):
            yield draw()
    while buffer:
        yield draw()


def parsed(raw: RawSample, caption_key: str) -> ShardSample:
    """Decodes nothing but the picture's header. Raises nearly anything if the sample is a bad one."""
    if "__error__" in raw:
        raise ValueError(raw["__error__"])
    suffix = picture_suffix(raw)
    if suffix is None:
        raise ValueError("there is no picture in it")
    picture = raw[suffix]
    caption = caption_of(raw, caption_key) or ""
    return ShardSample(_key(raw), caption, pictures.size_of(io.BytesIO(picture), FORMATS), picture)


def caption_of(raw: RawSample, key: str) -> str | None:
    """The caption in a.txt, a.caption, a.json, a.png.txt, … of a sample, or None."""
    for suffix in captions.suffixes(key):
        for content in (raw.get(f"{picture_suffix(raw)}{suffix}"), raw.get(suffix[1:])):
            if content is not None:
                is_json = suffix == captions.JSON_SUFFIX
                caption = captions.decode_json(content, key) if is_json else captions.decode(content)
                if caption is not None:
                    return caption
    return None


def _is_data(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, *CAPTION_SUFFIXES)) and not is_leftover(name)


def picture_suffix(raw: RawSample) -> str | None:
    return next((suffix[1:] for suffix in SUFFIXES if suffix[1:] in raw), None)


def _has_picture(raw: RawSample) -> bool:
    return picture_suffix(raw) is not None


def _has_caption(raw: RawSample) -> bool:
    return any(f".{suffix}".endswith(CAPTION_SUFFIXES) for suffix in raw)


def _bytes(raw: RawSample) -> int:
    return HEADER_BYTES + sum(len(content) for content in raw.values() if isinstance(content, bytes))


def _first(skipped: list[str]) -> str:
    return "; ".join(readable(message, 120) for message in skipped[:3])


def cause(error: Exception) -> str:
    """What is wrong, without the arguments that webdataset adds to an exception."""
    message = str(getattr(error, "strerror", None) or next(iter(error.args), type(error).__name__))
    status = re.search(r": (exit -?\d+) \(read\)", message)
    return f"its command ended with {status[1]}" if status else message.split(" @ <")[0]


def _key(raw: RawSample) -> str:
    return f"{raw['__url__']}/{raw['__key__']}"
