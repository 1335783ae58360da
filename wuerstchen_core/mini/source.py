"""The emoji as a `Source` of training data."""

import os
import random
import re
from pathlib import Path

from torch import Tensor

from ..util.errors import WuerstchenError
from .captions import caption
from .emoji import Description, EmojiSet

VARIANTS = re.compile(r"(.+)\?variants=(\d{1,6})")
MOST_VARIANTS = 1000


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


class EmojiVariants(EmojiSource):
    """The same few pictures of every emoji each time, the first of them plain, whose features can be cached.

    Captions differ from time to time.
    """

    def __init__(self, folder: str | Path, variants: int):
        super().__init__(folder)
        self.variants = variants

    def __reduce__(self):
        return EmojiVariants, (self.folder, self.variants)

    def __len__(self) -> int:
        return len(self.emoji) * self.variants

    def key(self, i: int) -> str:
        return f"{super().key(i // self.variants)}/{i % self.variants}"

    def stamp(self, i: int) -> str:
        status = os.stat(os.path.join(self.folder, "pictures.npy"))
        return f"{status.st_size} {status.st_mtime_ns}"

    def load(self, i: int, generator: random.Random) -> tuple[Tensor, str]:
        return self.emoji.compose(i // self.variants, **self._arranged(i)[1]), self.caption(i, generator)

    def caption(self, i: int, generator: random.Random) -> str:
        return caption(self._arranged(i)[0], generator)

    def _arranged(self, i: int) -> tuple[Description, dict]:
        number, variant = divmod(i, self.variants)
        return self.emoji.arrange(number, random.Random(f"{number} {variant}"), plain=float(variant == 0))


def emoji_source(data: str) -> EmojiSource | None:
    """The source of a data set that `wuerstchen data emoji` wrote, recognised by its emoji.json, or None.

    With `?variants=N` after the folder's name it has N pictures of every emoji that do not change.

    Raises WuerstchenError where N is not from 1 to MOST_VARIANTS.
    """
    if os.path.isfile(os.path.join(data, "emoji.json")):
        return EmojiSource(data)
    asked = VARIANTS.fullmatch(data)
    if asked is None or not os.path.isfile(os.path.join(asked[1], "emoji.json")):
        return None
    if not 1 <= int(asked[2]) <= MOST_VARIANTS:
        raise WuerstchenError(f"{data}: variants must be from 1 to {MOST_VARIANTS}")
    return EmojiVariants(asked[1], int(asked[2]))
