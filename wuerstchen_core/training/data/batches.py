"""Training data: batches of pictures with captions, from a folder, from shards or from any `Source`.

What a step sees follows from its number, so that a run is resumed by its number of steps alone.
"""

import logging
import os
import random
import signal
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ...util.errors import WuerstchenError
from .buckets import Size, bucket_sizes, fit, nearest_size
from .feature_cache import FeatureCache, Features, address, stacked
from .shards import ShardBatch, Shards, expand, is_shard
from .sources import FixedSource, FolderSource, Source

TOLD = 5  # bad samples that are named; the others are only counted
PATIENCE = 100  # batches of a stream of shards in which nothing can be decoded, one after another

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
    first: int = 0,
    cache: FeatureCache | None = None,
) -> Iterator[dict]:
    """Batches without end.

    A batch is {"image": (B, 3, H, W) float32 in [0, 1], "caption": B texts, "key": B names, "skipped": the number of
    bad samples that others stand in for}. Bad samples (damaged or huge pictures, captions that are not UTF-8) are never
    fatal; the first few are named in a warning.

    Folders and other sources: batches of all ranks together, `world` * `batch` samples of one bucket, are formed in an
    order that follows from the seed and the epoch, and rank r gets its r-th part. What is left over at an epoch's end
    goes on into the next. `workers` changes nothing but the speed.

    Shards: every worker of every rank has a share of its own and forms its own batches, so that the ranks' sizes differ
    at a step, and a run must be resumed with as many ranks and workers as it had (none and one are the same). To
    resume, it reads again all that it had read, but decodes none of it.

    Args:
        data: a folder (see `FolderSource`), urls or paths of shards (see `shards.expand`), or a `Source`.
        size: a picture has about `size` x `size` pixels.
        batch: B.
        buckets: several aspect ratios (see `bucket_sizes`); without, all pictures are square.
        rank, world: which of how many processes this is.
        workers: processes that load; with 0, this one does.
        first: how many batches this rank has had already: the number of steps from which a run goes on.
        cache: keeps features of samples. A batch then has "address", B texts for `cache.write`, and where the cache has
            all its samples "features" in place of "image": what `cache.read` gives. Nothing is decoded for it.

    Raises:
        WuerstchenError: there is no such data or nothing good in it, or a cache is given for samples that vary.
    """
    for name, value, least in (("batch", batch, 1), ("size", size, 1), ("workers", workers, 0), ("first", first, 0)):
        if value < least:
            raise WuerstchenError(f"{name} is {value}: it must be at least {least}")
    sizes = bucket_sizes(size) if buckets else [(size, size)]
    source = data if isinstance(data, Source) else _folder(data)
    if source is None:
        shards = Shards(expand(data), sizes, batch, seed)
        dataset, sampler = _ShardBatches(shards, _Assembler(range(batch), seed, cache), rank, world, first), None
    else:
        if len(source) == 0:
            raise WuerstchenError("there is no sample in the source")
        if cache is not None and not isinstance(source, FixedSource):
            raise WuerstchenError(f"the samples of {type(source).__name__} vary: their features can't be cached")
        places = range(rank * batch, (rank + 1) * batch)
        dataset = _SourceBatches(source, _Assembler(places, seed, cache))
        sampler = islice(enumerate(plan(source, sizes, world * batch, seed)), first, None)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        worker_init_fn=_leave_interrupts_to_parent,
        generator=torch.Generator(),  # of its own: the training's random state stays as it is
    )
    return _delivered(loader)


def plan(source: Source, sizes: Sequence[Size], batch: int, seed: int) -> Iterator[tuple[Size, list[int]]]:
    """The samples of every batch of a source, without end, and the size that their pictures get.

    The size of a picture is asked for once, when its turn comes in the first epoch.
    """
    chosen: dict[int, Size] = {}
    waiting = defaultdict(list)
    for epoch in count():
        order = list(range(len(source)))
        random.Random(f"epoch {seed} {epoch}").shuffle(order)
        for i in order:
            if i not in chosen:
                chosen[i] = sizes[0] if len(sizes) == 1 else _bucket(source, sizes, i)
            waiting[chosen[i]].append(i)
            if len(waiting[chosen[i]]) == batch:
                yield chosen[i], waiting.pop(chosen[i])


@dataclass(frozen=True)
class _Assembler:
    """Makes a batch of samples: of those that all ranks get at a step, the ones at this rank's places."""

    places: range
    seed: int
    cache: FeatureCache | None

    def assemble(self, candidates: Iterable[tuple[Source, Sequence[int]]], size: Size, step: int) -> dict:
        """The first of the candidates with anything good in it. Raises WuerstchenError where there is none."""
        told: list[str] = []
        for passed, (source, samples) in enumerate(candidates):
            batch, bad = self._batch(source, samples, size, step)
            told += bad
            if batch:
                return batch | {"skipped": batch["skipped"] + passed * len(self.places), "told": told[:TOLD]}
        raise WuerstchenError(f"not one sample can be read; {'; '.join(told[:3])}")

    def _batch(self, source: Source, samples: Sequence[int], size: Size, step: int) -> tuple[dict | None, list[str]]:
        """The batch, or None, and what was wrong with bad samples; each has the next good one's double in its place."""
        bad: dict[int, str] = {}

        def load(place: int, cached: bool) -> dict | None:
            for i in chain(samples[place:], samples[:place]):
                if i in bad:
                    continue
                try:
                    return self._sample(source, i, size, f"sample {self.seed} {step * len(samples) + place}", cached)
                except Exception as error:  # a damaged picture raises nearly anything
                    bad[i] = f"{source.key(i)}: {error or type(error).__name__}"
            return None

        loaded = [load(place, cached=True) for place in self.places]
        features = _features(loaded)
        if features is None:
            loaded = [
                load(place, cached=False) if sample and "features" in sample else sample
                for place, sample in zip(self.places, loaded)
            ]
        told = list(bad.values())
        if None in loaded:
            return None, told
        batch = {name: [sample[name] for sample in loaded] for name in loaded[0].keys() - {"image", "features"}}
        batch["skipped"] = sum(samples[place] in bad for place in self.places)
        if features is None:
            return batch | {"image": torch.stack([sample["image"] for sample in loaded])}, told
        return batch | {"features": features}, told

    def _sample(self, source: Source, i: int, size: Size, seed: str, cached: bool) -> dict:
        """One sample, with its features where it may come from the cache and is there, else with its picture."""
        sample = {"key": source.key(i)}
        if self.cache is not None:
            sample["caption"] = source.caption(i)
            sample["address"] = address(sample["key"], source.stamp(i), size, sample["caption"])
            features = self.cache.find(sample["address"]) if cached else None
            if features is not None:
                return sample | {"features": features}
        image, caption = source.load(i, random.Random(seed))
        return sample | {"image": fit(image, size), "caption": caption}


class _SourceBatches(Dataset):
    """A step of `plan` -> its batch, or the WuerstchenError that there is none."""

    def __init__(self, source: Source, assembler: _Assembler):
        self.source, self.assembler = source, assembler

    def __getitem__(self, request: tuple[int, tuple[Size, list[int]]]) -> dict | WuerstchenError:
        step, (size, samples) = request
        try:
            return self.assembler.assemble(self._candidates(samples, step), size, step)
        except WuerstchenError as error:
            return error

    def _candidates(self, samples: list[int], step: int) -> Iterator[tuple[Source, list[int]]]:
        """The samples planned, then all there are, as many at a time, from somewhere on."""
        yield self.source, samples
        total = len(self.source)
        start = random.Random(f"step {self.assembler.seed} {step}").randrange(total)
        for begin in range(start, start + total, len(samples)):
            yield self.source, [(begin + k) % total for k in range(len(samples))]


class _ShardBatches(IterableDataset):
    """The batches of one worker's share of the shards; at the end the WuerstchenError that there are no more.

    A DataLoader takes the batches from its workers in turn. So that the order is the same after `first` of them, each
    worker goes on with the share whose turn it is, behind what that share has given before.
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
        ahead: deque[ShardBatch] = deque()  # looked at because nothing before could be decoded; their turn comes yet

        def look_ahead() -> Iterator[ShardBatch]:
            yield from list(ahead)
            for batch in batches:
                ahead.append(batch)
                yield batch

        while True:
            planned = ahead.popleft() if ahead else next(batches)
            candidates = ((batch, range(len(batch))) for batch in islice(chain([planned], look_ahead()), PATIENCE))
            batch = self.assembler.assemble(candidates, planned.bucket, step=0)
            batch["skipped"] += len(planned.skipped)
            batch["told"] = [*planned.skipped, *batch["told"]][:TOLD]
            yield batch


def _folder(data: str | Path | Sequence[str | Path]) -> FolderSource | None:
    """The source that `data` names, unless it is shards."""
    if isinstance(data, (str, Path)) and (os.path.isdir(data) or not is_shard(str(data))):
        return FolderSource(data)
    return None


def _features(samples: Sequence[dict | None]) -> Features | None:
    """The features of samples, stacked, or None where one has none or they don't stack."""
    if not all(sample and "features" in sample for sample in samples):
        return None
    return stacked([sample["features"] for sample in samples])


def _bucket(source: Source, sizes: Sequence[Size], i: int) -> Size:
    try:
        return nearest_size(sizes, source.size(i))
    except Exception:  # a bad sample: it is found out, and told, when it is loaded
        return nearest_size(sizes, (1, 1))


def _delivered(loader: DataLoader) -> Iterator[dict]:
    told: set[str] = set()
    for batch in loader:
        if isinstance(batch, WuerstchenError):
            break
        for message in batch.pop("told"):
            if message not in told and len(told) < TOLD:
                told.add(message)
                last = "; more of them are only counted" if len(told) == TOLD else ""
                log.warning("skipped %s%s", " ".join(message.split()), last)
        yield batch
    raise batch  # here, where the loader's processes have ended: without an error there is no end


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
