"""The emoji as a `Source` of training data."""

import os
import random
from pathlib import Path

from torch import Tensor

from .captions import caption
from .emoji import EmojiSet


class EmojiSource:
    """The emoji of a data set that `wuerstchen data emoji` wrote, arranged and described differently each time.

    Raises WuerstchenError if the folder holds no such data set.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder
        self.emoji = EmojiSet(folder)

    def __reduce__(self):
        """Only the folder's name is sent to another process, where the pictures are again a view of the file."""
        return EmojiSource, (self.folder,)

    def __len__(self) -> int:
        return len(self.emoji)

    def key(self, i: int) -> str:
        entry = self.emoji.entries[i]
        return f"{entry['style']}/{entry['name']}"

    def size(self, i: int) -> tuple[int, int]:
        return self.emoji.size, self.emoji.size

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        image, description = self.emoji.draw(i, generator)
        return image, caption(description, generator)


def emoji_source(data: str) -> EmojiSource | None:
    """The source of a data set that `wuerstchen data emoji` wrote, recognised by its emoji.json, or None."""
    return EmojiSource(data) if os.path.isfile(os.path.join(data, "emoji.json")) else None
