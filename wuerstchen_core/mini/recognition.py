"""Whether a picture shows the emoji that its prompt asks for: a score like any other."""

import random

import torch
from torch import Tensor
from tqdm import tqdm

from ..reports.evaluation.reading import Scorer
from ..util.checks import whole_number
from ..util.errors import WuerstchenError, readable
from .captions import plain_caption
from .emoji import EmojiSet
from .evaluation import is_nearest, thumbnail


def plain_prompts(emoji: EmojiSet, count: int) -> list[str]:
    """The plain captions of `count` emoji of the data set, the same each time."""
    whole_number("--limit", count, 1, len(emoji))
    return [_caption(emoji, i) for i in random.Random("plain prompts").sample(range(len(emoji)), count)]


def check_prompts(emoji: EmojiSet, prompts: list[str]) -> None:
    """Raises WuerstchenError for a prompt that is no plain caption, "<name>, <style> style"."""
    known = {_caption(emoji, i) for i in range(len(emoji))}
    unknown = [prompt for prompt in prompts if prompt not in known]
    if unknown:
        raise WuerstchenError(
            f"--emoji: the prompt {readable(unknown[0], 100)!r} names no emoji of the data set: prompts must be like "
            "'red apple, noto style', or leave --prompts out"
        )


def recognition(emoji: EmojiSet) -> Scorer:
    """1 where no plain picture of its style is nearer than that of the prompted emoji, else 0; the mean is top-1.

    Captions are plain ones (`check_prompts`).
    """
    plain = torch.stack([thumbnail(emoji.plain(i)) for i in tqdm(range(len(emoji)), desc="plain", leave=False)])
    numbers = {_caption(emoji, i): i for i in range(len(emoji))}

    def score(images: list[Tensor], captions: list[str]) -> Tensor:
        pairs = zip(images, captions, strict=True)
        hits = [is_nearest(image.permute(1, 2, 0), numbers[caption], emoji, plain) for image, caption in pairs]
        return torch.tensor(hits).float()

    return score


def _caption(emoji: EmojiSet, i: int) -> str:
    return plain_caption(emoji.entries[i]["name"], emoji.entries[i]["style"])
