"""Emoji, and sources of one's own."""

import pickle
import random

import pytest
import torch

from tests.training.data.samples import take
from wuerstchen_core import WuerstchenError
from wuerstchen_core.mini.emoji import EmojiSet
from wuerstchen_core.mini.source import EmojiSource
from wuerstchen_core.training.data.batches import open_batches
from wuerstchen_core.training.data.feature_cache import FeatureCache
from wuerstchen_core.training.data.sources import FixedSource, Source


def test_emoji_are_drawn_anew_each_time_and_the_same_for_every_number_of_ranks(emoji):
    source = EmojiSource(emoji)
    assert isinstance(source, Source) and not isinstance(source, FixedSource)
    assert len(source) == 6 and source.size(0) == (256, 256) and source.key(4) == "noto/green disc"
    image, caption = source.load(4, random.Random(3))
    generator = random.Random(3)
    expected, description = EmojiSet(emoji).draw(4, generator)
    assert torch.equal(image, expected) and ("disc" in caption.lower() or "round" in caption.lower())
    batches = take(12, source, 256, 2, workers=1)
    named = {pair for batch in batches for pair in zip(batch["key"], batch["caption"], strict=True)}
    assert len(named) > 12
    halves = [take(12, source, 256, 1, rank=rank, world=2) for rank in range(2)]
    for whole, first, second in zip(batches, *halves, strict=True):
        assert torch.equal(whole["image"], torch.cat([first["image"], second["image"]]))
        assert whole["caption"] == first["caption"] + second["caption"]
    copied = pickle.dumps(source)
    assert len(copied) < 1000 and same_sample(pickle.loads(copied).load(4, random.Random(3)), (image, caption))


def same_sample(one, other):
    return torch.equal(one[0], other[0]) and one[1] == other[1]


def test_emoji_can_not_be_cached(emoji, tmp_path):
    with pytest.raises(WuerstchenError, match="EmojiSource vary: their features can't be cached"):
        open_batches(EmojiSource(emoji), 256, 2, cache=FeatureCache(tmp_path / "cache", "x"))
