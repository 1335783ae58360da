"""Captions for pictures of emoji, as people would type them."""

import random

from .emoji import Description

SIZE_WORDS = {"tiny": ("tiny", "very small"), "small": ("small", "little"), "big": ("big", "large", "huge")}
COLOUR_WORDS = {"gray": ("gray", "grey"), "navy": ("navy", "navy blue")}
FRAMES = ("a photo of", "photo of", "a picture of", "an image of", "a drawing of", "an icon of")
AMBIGUOUS = {word for spellings in SIZE_WORDS.values() for word in spellings}


def plain_caption(name: str, style: str) -> str:
    """The canonical prompt for a plain picture, which evaluations use."""
    return f"{name}, {style} style"


def keyword_caption(keywords: tuple[str, ...], style: str) -> str:
    """The canonical prompt for a plain picture by all its keywords instead of its name."""
    return ", ".join((*keywords, f"{style} style"))


def caption(description: Description, generator: random.Random) -> str:
    """A caption in one of many wordings, sometimes without the style, always with everything that is not plain."""
    d = description
    chance = generator.random()
    keywords = [k for k in d.keywords if k not in AMBIGUOUS]
    by_keywords = chance < 0.15 and len(keywords) >= 2
    style = None if generator.random() < 0.1 else d.style
    size = generator.choice(SIZE_WORDS[d.size]) if d.size else None
    tail = []

    if by_keywords:
        count = min(len(keywords), generator.choice((2, 3, len(keywords))))
        subject = ", ".join(generator.sample(keywords, count))
        if size:
            tail.append(f", {size}")
    else:
        subject = d.name if generator.random() < 0.95 else plural(d.name)
        frame = ""
        if style and generator.random() < 0.2:
            subjects = f"{d.style} emoji of {with_article(subject)}", f"{d.style} {subject}"
            subject, style = generator.choice(subjects), None
        elif generator.random() < 0.1:
            frame = f"{generator.choice(FRAMES)} "
        if size and generator.random() < 0.75:
            subject = f"{size} {subject}"
        elif size:
            tail.append(f", {size}")
        if generator.random() < 0.4:
            subject = with_article(subject)
        subject = frame + subject
        if 0.15 <= chance < 0.25 and keywords:
            tail.append(f", {generator.choice(keywords)}")

    if style:
        styles = (", {} style", ", {} style", " in {} style", " in the {} style", ", {} emoji", ", {}")
        tail.append(generator.choice(styles).format(style))
    if d.background:
        colour = generator.choice(COLOUR_WORDS.get(d.background, (d.background,)))
        backgrounds = (" on {a} background", ", {} background", " on {}", ", on {a} background", " with {a} background")
        tail.append(generator.choice(backgrounds).format(colour, a=with_article(colour)))
    if d.place:
        tail.append(generator.choice((" {}", ", {}")).format(d.place))

    # Phrases without a comma come first, so that they belong to the subject and not to another phrase.
    generator.shuffle(tail)
    tail.sort(key=lambda phrase: phrase.startswith(","))
    text = subject + "".join(tail)
    chance = generator.random()
    return text.capitalize() if chance < 0.08 else text.upper() if chance < 0.1 else text


def with_article(words: str) -> str:
    """The words after "a" or "an", or unchanged if they look like a plural."""
    if words.endswith("s") and not words.endswith(("ss", "us")):
        return words
    vowel = words.startswith((*"aeiou", "hour")) and not words.startswith(("uni", "ewe", "euro", "one"))
    return f"{'an' if vowel else 'a'} {words}"


def plural(name: str) -> str:
    """The name of several, by the regular endings; unchanged if it looks like a plural or does not end in a word."""
    if not name[-1:].isalpha() or name.endswith("s") and not name.endswith(("ss", "us")):
        return name
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in tuple("aeiou"):
        return f"{name[:-1]}ies"
    return f"{name}s"
