import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...util.errors import WuerstchenError
from ..options import check_at_least, check_at_most, check_shares, option
from .batches import Seen, open_batches
from .feature_cache import FeatureCache
from .filters import Filters
from .shards import expand, is_shard
from .sources import Source, recognised

LARGEST_SIZE = 8192  # pixels of a side
LARGEST_BATCH = 1 << 16
MOST_WORKERS = 1024


@dataclass(frozen=True)
class DataOptions:
    """What a run learns from."""

    data: str = option(
        help="a folder of pictures with captions, shards ({000..099}.tar, s3://...; on the command line also pipe:...) "
        "or a registered data set"
    )
    size: int = option(1024, "pictures have about size x size pixels")
    batch: int = option(8, "batch size of each process")
    workers: int = option(4, "processes that load pictures; 0: the training process loads them")
    buckets: bool = option(True, "several aspect ratios, up to 2:1; false: all pictures are cropped to squares")
    caption_key: str = option(
        "", "key of the caption in .json and metadata files; empty: caption, text or prompt, in this order"
    )
    allow_empty_captions: bool = option(False, "train even if no picture has a caption")
    min_side: int = option(
        0, "shards: leave out pictures whose shorter side has fewer pixels (by their .json, if it says)"
    )
    min_aesthetic: float = option(0.0, "shards: leave out pictures whose .json has a lower aesthetic score, or none")
    max_watermark: float = option(1.0, "shards: leave out pictures whose .json has a higher pwatermark, or none")
    max_unsafe: float = option(1.0, "shards: leave out pictures whose .json has a higher punsafe, or none")
    held_out: int = option(0, "pictures that are not learned from: their loss is logged at every checkpoint")
    cache: str = option("", "folder that keeps the frozen networks' features of pictures and captions; empty: none")

    def __post_init__(self):
        if not self.data.strip():
            raise WuerstchenError("data is empty: name a folder of pictures with captions, or shards")
        check_at_least(1, self, "size", "batch")
        check_at_least(0, self, "workers", "min_side", "min_aesthetic", "held_out")
        check_shares(self, "max_watermark", "max_unsafe")
        check_at_most(LARGEST_SIZE, self, "size")
        check_at_most(LARGEST_BATCH, self, "batch")
        check_at_most(MOST_WORKERS, self, "workers")

    @property
    def source(self) -> Source | str:
        """What `open_batches` takes."""
        return recognised(self.data) or self.data

    def open(
        self,
        seed: int,
        first: int | Seen = 0,
        rank: int = 0,
        world: int = 1,
        cache: FeatureCache | None = None,
        reads_captions: bool = False,
        index: Path | None = None,
        validation: bool = False,
    ) -> Iterator[dict]:
        """`open_batches` with these options; `reads_captions` says whether a missing caption matters."""
        captions = ("optional" if self.allow_empty_captions else "required") if reads_captions else "unused"
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
            captions=captions,
            caption_key=self.caption_key,
            filters=Filters(self.min_side, self.min_aesthetic, self.max_watermark, self.max_unsafe),
            index=index,
            held_out=self.held_out,
            validation=validation,
        )

    def first_batch(self, count: int) -> dict:
        """`count` square pictures with their captions, always the same ones, for samples."""
        return next(replace(self, batch=count, buckets=False, workers=0, held_out=0).open(seed=0))

    def first_pictures(self, count: int) -> Tensor:
        """The pictures of `first_batch` as floats, (count, 3, H, W) in [0, 1]."""
        return self.first_batch(count)["image"].float() / 255


def check_no_commands(table: Mapping[str, Any], path: str) -> None:
    """Raises WuerstchenError if the data named in a configuration file is read by a command.

    A configuration may come from somebody else, and would run whatever they please.
    """
    data = table.get("data")
    if not isinstance(data, str) or os.path.isdir(data) or not is_shard(data):
        return
    if any(url.lower().startswith("pipe:") for url in expand(data)):
        raise WuerstchenError(
            f"{path}: data runs a command (pipe:), which a configuration file must not do: give it on the command line "
            "with --data"
        )
