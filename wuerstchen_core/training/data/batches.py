"""Training data: batches of pictures with captions, from a folder, from shards or from any `Source`.

The batch of a step follows from the step's number, so that a run can resume with nothing but its number of steps.
"""

import logging
import os
import random
import signal
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ...util.errors import WuerstchenError, readable
from .buckets import Size, bucket_sizes, crop_and_resize, nearest_size
from .feature_cache import FeatureCache, Features, address, stacked
from .filters import KEEP_ALL, Filters
from .shard_index import ShardSource, are_indexed
from .shards import ShardBatch, Shards, expand, is_shard
from .sources import FixedSource, FolderSource, Source, epoch_order, part_of
from .tally import Tally

NAMED = 5  # bad samples that are named; the others are only counted
LOOK_AHEAD = 100  # batches of a stream of shards that are tried one after another if nothing can be decoded
LOOK_AHEAD_BYTES = 1 << 30  # and the size of their pictures, at most
CAPTIONS = ("unused", "optional", "required")

Seen = Sequence[tuple[int, int]]  # (number of batches, samples in each on all ranks together), in their order

log = logging.getLogger(__name__)


def open_batches(
    data: Source | str | Path | Sequence[str | Path],
    size: int,
    batch: int,
    *,
    buckets: bool = True,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    first: int | Seen = 0,
    cache: FeatureCache | None = None,
    captions: str = "optional",
    caption_key: str = "",
    filters: Filters = KEEP_ALL,
    index: str | Path | None = None,
    held_out: int = 0,
    validation: bool = False,
) -> Iterator[dict]:
    """Batches without end.

    A batch is {"image": (B, 3, H, W) uint8, "caption": B texts, "key": B names, "skipped": the number of
    bad samples that others replace}. Bad samples (damaged or huge pictures, captions that are not UTF-8) are never
    fatal; the first few are named in a warning.

    Folders, indexed shards and other sources: batches of all ranks together, `world` * `batch` samples of one bucket,
    are formed in an order that follows from the seed and the epoch, and rank r gets the r-th part. Samples left over at
    an epoch's end are used in the next. `workers` changes nothing but the speed, and a run may be resumed with any
    number of ranks: each sample is seen once an epoch all the same.

    Other shards, from the net, from commands and compressed ones, are streams: every worker of every rank has a share
    of its own and forms its own batches, so that the ranks' picture sizes differ at a step, and a run must be resumed
    with the same number of ranks and workers (0 and 1 workers are the same). To resume, everything is read again up to
    that step, but nothing is decoded.

    Args:
        data: a folder (see `FolderSource`), urls or paths of shards (see `shards.expand`), or a `Source`.
        size: a picture has about `size` x `size` pixels.
        batch: B.
        buckets: several aspect ratios (see `bucket_sizes`); if false, all pictures are square.
        rank, world: the number of this process, and how many there are.
        workers: processes that load pictures; with 0, this process does.
        first: number of batches that this rank has had already: the step from which a run resumes. Where their sizes
            were others: pairs (number of batches, samples in each on all ranks together), in their order.
        cache: keeps features of samples. A batch then has "address", B texts for `cache.write`, and if the cache has
            all its samples "features" in place of "image": what `cache.read` gives. Nothing is decoded for it.
        captions: "unused"; "optional": pictures without a caption are counted in warnings; "required": moreover it is
            an error if no picture has one.
        caption_key: key of the caption in JSON and metadata files; "": one of `captions.CAPTION_KEYS`.
        filters: which samples of shards are left out.
        index: a folder that keeps an index of shards (see `shard_index`); without, all shards are read as streams.
        held_out: number of samples that are kept for validation; which ones follows from their names.
        validation: give these and no others, each in a batch of its own, and end after the last.

    Raises:
        WuerstchenError: there is no such data or nothing good in it, all captions are missing though they are required,
            a cache is given for samples that vary, or filters or held-out samples for data that don't have them.
    """
    had: Seen = [(first, world * batch)] if isinstance(first, int) else first
    passed = sum(count for count, _ in had)
    for name, value, least in (("batch", batch, 1), ("size", size, 1), ("workers", workers, 0), ("first", passed, 0)):
        if value < least:
            raise WuerstchenError(f"{name} is {value}: it must be at least {least}")
    if captions not in CAPTIONS:
        raise WuerstchenError(f"captions is {captions!r}: choose one of {', '.join(CAPTIONS)}")
    sizes = bucket_sizes(size) if buckets else [(size, size)]
    source = data if isinstance(data, Source) else _named(data, caption_key)
    missing = None
    if isinstance(source, list):
        shards = Shards(source, sizes, batch, seed, caption_key, filters)
        shards.check_captions(captions == "required")
        missing = Tally() if captions != "unused" else None
        if index is not None and are_indexed(source):
            source = ShardSource(source, index, caption_key, filters, rank, world)
            _tell(source.told, set())
    elif filters.are_set:
        raise WuerstchenError(
            "min_side, min_aesthetic, max_watermark and max_unsafe are read from shards: leave them out"
        )
    dataset: Dataset
    if isinstance(source, list):
        if held_out:
            raise WuerstchenError("held_out needs a folder, or .tar files on a disk: these shards are streams")
        dataset, sampler = _ShardBatches(shards, _Assembler(range(batch), seed, cache), rank, world, passed), None
    else:
        if len(source) == 0:
            raise WuerstchenError("there is no sample in the source")
        if cache is not None and not isinstance(source, FixedSource):
            raise WuerstchenError(f"the samples of {type(source).__name__} vary: their features can't be cached")
        if isinstance(source, FolderSource) and captions != "unused":
            source.check_captions(captions == "required")
        if held_out:
            source = part_of(source, held_out, validation)
        positions = range(1) if validation else range(rank * batch, (rank + 1) * batch)
        dataset = _SourceBatches(source, _Assembler(positions, seed, cache))
        totals = chain.from_iterable(repeat(total, count) for count, total in had)
        order = batch_order(source, sizes, chain(totals, repeat(world * batch)), seed)
        each = ((_bucket(source, sizes, i), [i]) for i in range(len(source)))
        sampler = list(enumerate(each)) if validation else islice(enumerate(order), passed, None)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        worker_init_fn=_leave_interrupts_to_parent,
        generator=torch.Generator(),  # of its own: the training's random state stays as it is
        pin_memory=torch.cuda.is_available(),
    )
    return _delivered(loader, missing)


def batch_order(
    source: Source, sizes: Sequence[Size], totals: Iterator[int], seed: int
) -> Iterator[tuple[Size, list[int]]]:
    """The picture size and the samples of every batch of a source, which has as many as `totals` says, without end.

    The size of a picture is read once, when its turn comes in the first epoch.
    """
    chosen: dict[int, Size] = {}
    waiting: dict[Size, list[int]] = defaultdict(list)
    total = next(totals)
    for epoch in count():
        for i in epoch_order(source, random.Random(f"epoch {seed} {epoch}")):
            if i not in chosen:
                chosen[i] = sizes[0] if len(sizes) == 1 else _bucket(source, sizes, i)
            same = waiting[chosen[i]]
            same.append(i)
            while len(same) >= total:
                yield chosen[i], same[:total]
                del same[:total]
                total = next(totals)


@dataclass(frozen=True)
class _Assembler:
    """Loads batches: of the samples that all ranks get at a step, those at this rank's positions."""

    positions: range
    seed: int
    cache: FeatureCache | None

    def assemble(self, candidates: Iterable[tuple[Source, Sequence[int]]], size: Size, step: int) -> dict:
        """The first of the candidates with anything good in it. Raises WuerstchenError if there is none."""
        messages: list[str] = []
        for passed, (source, samples) in enumerate(candidates):
            batch, bad = self._batch(source, samples, size, step)
            messages += bad
            if batch:
                skipped = batch["skipped"] + passed * len(self.positions)
                return batch | {"skipped": skipped, "messages": messages[:NAMED]}
        raise WuerstchenError(
            f"not one sample can be read; {'; '.join(readable(message, 120) for message in messages[:3])}"
        )

    def _batch(self, source: Source, samples: Sequence[int], size: Size, step: int) -> tuple[dict | None, list[str]]:
        """The batch, or None, and what is wrong with bad samples; each is replaced by the next good one."""
        bad: dict[int, str] = {}

        def load(position: int, cached: bool) -> dict | None:
            for i in chain(samples[position:], samples[:position]):
                if i in bad:
                    continue
                try:
                    return self._sample(source, i, size, f"sample {self.seed} {step * len(samples) + position}", cached)
                except Exception as error:  # a damaged picture raises nearly anything
                    bad[i] = readable(f"{source.key(i)}: {error or type(error).__name__}")
            return None

        loaded = [load(position, cached=True) for position in self.positions]
        features = _features(loaded)
        if features is None:
            loaded = [
                load(position, cached=False) if sample and "features" in sample else sample
                for position, sample in zip(self.positions, loaded, strict=True)
            ]
        messages = list(bad.values())
        good = [sample for sample in loaded if sample is not None]
        if len(good) < len(loaded):
            return None, messages
        batch: dict[str, Any] = {name: [one[name] for one in good] for name in good[0].keys() - {"image", "features"}}
        batch["skipped"] = sum(samples[position] in bad for position in self.positions)
        if features is None:
            return batch | {"image": torch.stack([sample["image"] for sample in good])}, messages
        return batch | {"features": features}, messages

    def _sample(self, source: Source, i: int, size: Size, seed: str, cached: bool) -> dict:
        """One sample, with its features if it may come from the cache and is there, else with its picture."""
        sample = {"key": source.key(i)}
        if self.cache is not None and isinstance(source, FixedSource):
            sample["caption"] = source.caption(i, random.Random(seed))
            described = sample["caption"] if self.cache.of_captions else ""
            sample["address"] = address(sample["key"], source.stamp(i), size, described)
            features = self.cache.find(sample["address"]) if cached else None
            if features is not None:
                return sample | {"features": features}
        image, caption = source.load(i, random.Random(seed))
        return sample | {"image": (crop_and_resize(image, size) * 255).round().byte(), "caption": caption}


class _SourceBatches(Dataset):
    """A step of `batch_order` -> its batch, or the WuerstchenError that there is none."""

    def __init__(self, source: Source, assembler: _Assembler):
        self.source, self.assembler = source, assembler

    def __getitem__(self, request: tuple[int, tuple[Size, list[int]]]) -> dict | WuerstchenError:
        step, (size, samples) = request
        try:
            return self.assembler.assemble(self._candidates(samples, step), size, step)
        except WuerstchenError as error:
            return error

    def _candidates(self, samples: list[int], step: int) -> Iterator[tuple[Source, list[int]]]:
        """The batch's own samples, then all others, as many at a time, from a random one on."""
        yield self.source, samples
        total = len(self.source)
        start = random.Random(f"step {self.assembler.seed} {step}").randrange(total)
        for begin in range(start, start + total, len(samples)):
            yield self.source, [(begin + k) % total for k in range(len(samples))]


class _ShardBatches(IterableDataset):
    """The batches of one worker's share of the shards; at the end the WuerstchenError that there are no more.

    A DataLoader takes the batches from its workers in turn. To keep their order after `first` of them, each worker
    continues the share whose turn it is, after what that share has given before.
    """

    def __init__(self, shards: Shards, assembler: _Assembler, rank: int, world: int, first: int):
        self.shards, self.assembler = shards, assembler
        self.rank, self.world, self.first = rank, world, first

    def __iter__(self) -> Iterator[dict | WuerstchenError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = (worker + self.first) % workers
        batches = self.shards.batches(self.rank * workers + share, self.world * workers)
        given = len(range(share, self.first, workers))
        try:
            yield from self._assembled(islice(batches, given, None))
        except WuerstchenError as error:
            yield error

    def _assembled(self, batches: Iterator[ShardBatch]) -> Iterator[dict]:
        ahead: deque[ShardBatch] = deque()  # read because nothing before could be decoded; their turn is still to come

        def look_ahead() -> Iterator[ShardBatch]:
            yield from list(ahead)
            for batch in batches:
                ahead.append(batch)
                yield batch
                if sum(waiting.nbytes for waiting in ahead) > LOOK_AHEAD_BYTES:
                    return

        while True:
            own = ahead.popleft() if ahead else next(batches)
            candidates = ((batch, range(len(batch))) for batch in islice(chain([own], look_ahead()), LOOK_AHEAD))
            batch = self.assembler.assemble(candidates, own.bucket, step=0)
            batch["skipped"] += len(own.skipped)
            batch["messages"] = [*own.skipped, *batch["messages"]][:NAMED]
            yield batch


def _named(data: str | Path | Sequence[str | Path], caption_key: str) -> FolderSource | list[str]:
    """The folder that `data` names, or the urls of its shards."""
    if isinstance(data, (str, Path)) and (os.path.isdir(data) or not is_shard(str(data))):
        return FolderSource(data, caption_key)
    return expand(data)


def _features(samples: Sequence[dict | None]) -> Features | None:
    """The features of samples, stacked, or None if one has none or they can't be stacked."""
    found = [sample["features"] for sample in samples if sample and "features" in sample]
    return stacked(found) if len(found) == len(samples) else None


def _bucket(source: Source, sizes: Sequence[Size], i: int) -> Size:
    try:
        return nearest_size(sizes, source.size(i))
    except Exception:  # a bad sample: it is found, and reported, when it is loaded
        return nearest_size(sizes, (1, 1))


def _delivered(loader: DataLoader, missing: Tally | None) -> Iterator[dict]:
    """The batches, with warnings of bad samples and, if they are to be counted, of missing captions."""
    named: set[str] = set()
    for batch in loader:
        if isinstance(batch, WuerstchenError):
            error = batch
            break
        _tell(batch.pop("messages"), named)
        if missing is not None:
            bare = [key for key, caption in zip(batch["key"], batch["caption"], strict=True) if not caption]
            if missing.add(len(bare), len(batch["key"])):
                log.warning(
                    "%d of %d pictures so far have no caption and are learned with an empty one, such as %s",
                    missing.faulty,
                    missing.total,
                    readable(bare[0]),
                )
        yield batch
    else:
        return
    raise error  # here, where the loader's processes have ended: without an error there is no end


def _tell(messages: Sequence[str], named: set[str]) -> None:
    """Warns of bad samples, until NAMED of them are named."""
    for message in messages:
        if message not in named and len(named) < NAMED:
            named.add(message)
            last = "; more of them are only counted" if len(named) == NAMED else ""
            log.warning("skipped %s%s", message, last)


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
