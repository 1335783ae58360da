from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from .data import open_batches
from .feature_cache import FeatureCache
from .options import option
from .sources import EmojiSource, Source


@dataclass(frozen=True)
class DataOptions:
    """What a run learns from."""

    data: str = option(help="a folder of pictures with captions, shards ({000..099}.tar, pipe:…, s3://…), or emoji")
    size: int = option(1024, "pictures have about size x size pixels")
    batch: int = option(8, "pictures in a batch; with several processes, in each of theirs")
    workers: int = option(4, "processes that load pictures; 0: the training itself does")
    buckets: bool = option(True, "several aspect ratios, up to 2:1; false: all pictures are cut square")
    cache: str = option("", "a folder that keeps what the frozen networks make of pictures and captions; empty: none")

    @property
    def source(self) -> Source | str:
        """What `open_batches` takes; a data set of `wuerstchen data emoji` is known by its file emoji.json."""
        return EmojiSource(self.data) if (Path(self.data) / "emoji.json").is_file() else self.data

    def open(
        self, seed: int, first: int = 0, rank: int = 0, world: int = 1, cache: FeatureCache | None = None
    ) -> Iterator[dict]:
        return open_batches(
            self.source,
            self.size,
            self.batch,
            buckets=self.buckets,
            seed=seed,
            rank=rank,
            world=world,
            workers=self.workers,
            first=first,
            cache=cache,
        )

    def first_pictures(self, count: int) -> Tensor:
        """(count, 3, H, W) in [0, 1], square, always the same ones: what samples show."""
        return next(replace(self, batch=count, buckets=False, workers=0).open(seed=0))["image"]
