"""Emoji, and sources of one's own."""

import pickle
import random

import pytest
import torch

from tests.training.data.samples import take
from wuerstchen_core import WuerstchenError
from wuerstchen_core.mini.emoji import EmojiSet
from wuerstchen_core.mini.source import EmojiSource, emoji_source
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


def test_variants_are_the_same_pictures_each_time_with_captions_of_their_own(emoji):
    source = emoji_source(f"{emoji}?variants=3")
    assert isinstance(source, FixedSource) and len(source) == 18 and source.key(14) == "noto/green disc/2"
    data = EmojiSet(emoji)
    pictures = [source.load(i, random.Random(i))[0] for i in range(18)]
    for i, picture in enumerate(pictures):
        image, caption = source.load(i, random.Random(99))
        assert torch.equal(image, picture) and caption == source.caption(i, random.Random(99))
        assert torch.equal(image, data.plain(i // 3)) == (i % 3 == 0)
    captions = {source.caption(13, random.Random(seed)) for seed in range(50)}
    assert len(captions) > 10 and all("green" in caption.lower() for caption in captions)
    described = source._arranged(13)[0]
    assert all(described.background is None or "on " in c.lower() or "background" in c.lower() for c in captions)
    copied = pickle.dumps(source)
    assert len(copied) < 1000 and same_sample(
        pickle.loads(copied).load(4, random.Random(3)), source.load(4, random.Random(3))
    )
    assert emoji_source(f"{emoji}x?variants=3") is None and not isinstance(emoji_source(str(emoji)), FixedSource)
    with pytest.raises(WuerstchenError, match="variants must be from 1 to 1000"):
        emoji_source(f"{emoji}?variants=0")


def test_features_of_pictures_alone_serve_all_their_captions(emoji, tmp_path):
    source = emoji_source(f"{emoji}?variants=2")
    for of_captions in (True, False):
        cache = FeatureCache(tmp_path / str(of_captions), "weights", of_captions)
        for batch in take(3, source, 256, 4, cache=cache):
            cache.write(batch["address"], {"a": torch.zeros(4, 1)})
        seen = take(6, source, 256, 4, cache=cache)[3:]  # the second epoch
        assert all("features" in batch for batch in seen) != of_captions
        assert [batch["caption"] for batch in seen] == [batch["caption"] for batch in take(6, source, 256, 4)[3:]]


def test_emoji_can_not_be_cached(emoji, tmp_path):
    with pytest.raises(WuerstchenError, match="EmojiSource vary: their features can't be cached"):
        open_batches(EmojiSource(emoji), 256, 2, cache=FeatureCache(tmp_path / "cache", "x"))
