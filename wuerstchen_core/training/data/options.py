from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ..options import option
from .batches import open_batches
from .feature_cache import FeatureCache
from .sources import Source, recognised


@dataclass(frozen=True)
class DataOptions:
    """What a run learns from."""

    data: str = option(
        help="a folder of pictures with captions, shards ({000..099}.tar, pipe:…, s3://…) or a data set of ours"
    )
    size: int = option(1024, "pictures have about size x size pixels")
    batch: int = option(8, "pictures in a batch; with several processes, in each of theirs")
    workers: int = option(4, "processes that load pictures; 0: the training itself does")
    buckets: bool = option(True, "several aspect ratios, up to 2:1; false: all pictures are cut square")
    cache: str = option("", "a folder that keeps what the frozen networks make of pictures and captions; empty: none")

    @property
    def source(self) -> Source | str:
        """What `open_batches` takes."""
        return recognised(self.data) or self.data

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
