"""The emoji's captions."""

import random
import re

import pytest

from wuerstchen_core.mini.captions import FRAMES, SIZE_WORDS, caption, plain_caption, plural
from wuerstchen_core.mini.emoji import COLOURS, PLACES, SIZES, Description

WORDS = {
    "background": {colour: (colour,) for colour in COLOURS} | {"gray": ("gray", "grey")},
    "size": SIZE_WORDS,
    "place": {place: (place,) for place in PLACES},
}


def said(text):
    """The attributes that a caption names."""
    text = text.lower().replace("navy blue", "navy")
    return {
        (kind, value)
        for kind, values in WORDS.items()
        for value, spellings in values.items()
        if any(re.search(rf"(?<!very )\b{s}\b", text) for s in spellings)
    }


@pytest.mark.parametrize("keywords", [(), ("cheese",), ("cheese", "slice", "big", "tiny", "food")])
def test_captions_say_what_is_not_plain_and_nothing_else(keywords):
    generator = random.Random(0)
    for background in (None, *COLOURS):
        for size, place in [(s, None) for s in (None, *SIZES)] + [("small", p) for p in PLACES]:
            d = Description("pizza", keywords, "noto", background, size, place)
            expected = {(k, getattr(d, k)) for k in WORDS if getattr(d, k)}
            for _ in range(60):
                text = caption(d, generator)
                assert said(text) == expected, text
                assert "pizza" in text.lower() or len(keywords) > 1
                assert text == text.strip() and not re.search(r"  |,,| ,|,\S|None|[{}]", text), text


def test_captions_vary():
    generator = random.Random(1)
    d = Description("owl", ("bird", "wise", "night"), "fluent", "orange", "small", "on the left")
    texts = [caption(d, generator) for _ in range(2000)]
    assert len(set(texts)) > 500
    assert 0.05 < sum("fluent" not in t.lower() for t in texts) / 2000 < 0.15
    assert 0.10 < sum("owl" not in t.lower() for t in texts) / 2000 < 0.20
    assert sum(t == t.lower() for t in texts) / 2000 > 0.85
    assert any("an orange background" in t for t in texts) and not any("a orange" in t for t in texts)


@pytest.mark.parametrize("name, expected", [
    ("pizza", "a pizza"), ("owl", "an owl"), ("unicorn", "a unicorn"), ("hourglass done", "an hourglass done"),
    ("grapes", "grapes"), ("octopus", "an octopus"), ("cross", "a cross"),
])  # fmt: skip
def test_articles(name, expected):
    texts = {caption(Description(name, (), "noto"), random.Random(seed)).lower() for seed in range(300)}
    assert expected in {t.split(",")[0].split(" in ")[0] for t in texts}
    start = rf"({'|'.join(FRAMES)})? ?({expected}|{name}|{plural(name)}|noto|a noto)\b"
    assert all(re.match(start, t) for t in texts)
    assert any(re.match(rf"({'|'.join(FRAMES)}) {expected}\b", t) for t in texts)


@pytest.mark.parametrize("name, expected", [
    ("pizza", "pizzas"), ("fox", "foxes"), ("cherry", "cherries"), ("donkey", "donkeys"), ("octopus", "octopuses"),
    ("grapes", "grapes"), ("peach", "peaches"), ("dress", "dresses"), ("keycap 5", "keycap 5"), ("a", "as"),
])  # fmt: skip
def test_plurals(name, expected):
    assert plural(name) == expected
    texts = [caption(Description(name, (), "noto"), random.Random(seed)).lower() for seed in range(300)]
    if expected != name:
        assert 2 < sum(bool(re.search(rf"\b{expected}\b", text)) for text in texts) < 40


def test_plain_caption():
    assert plain_caption("pizza", "noto") == "pizza, noto style"
