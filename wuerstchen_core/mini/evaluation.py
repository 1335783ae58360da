"""The embedded model's figures: how well pictures survive a round trip, and whether prompts are followed."""

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from .. import pipeline
from ..diffusion.options import STAGE_B, STAGE_C
from ..geometry import Geometry
from ..pipeline import Sampling, Wuerstchen
from ..reports.evaluation.distances import psnr
from ..util.errors import WuerstchenError
from .captions import keyword_caption, plain_caption, with_article
from .emoji import COLOURS, PLACES, SIZES, EmojiSet

BATCH = 10
SIDE = 64  # pixels a side in which a picture is compared with the data set's
EDGE = 8  # pixels from the side that are background, in a picture with an emoji of the plain size
PLACEABLE = ("tiny", "small")  # sizes that have a place
KEYWORDS = 2  # that an emoji must have to be prompted by its keywords


def evaluate(model: Wuerstchen, emoji: EmojiSet, count: int, sampling: Sampling | None = None) -> Iterator[str]:
    """The figures on `count` pictures or prompts, one per line; drawn by the networks as they are, or by `sampling`.

    The pictures of the round trips are drawn with placements and colours that training did not see. Prompts are the
    plain ones, "<name>, <style> style"; a picture counts when, of all plain pictures of the style, that of the
    prompted emoji is the nearest by the cosine similarity of 64x64 pixels, or as near as the nearest: a few emoji of a
    style have the same picture. The same is measured with all keywords in place of the name, for emoji that
    have at least two. With a colour in the prompt, "<name>, <style> style, on a <colour> background", a picture counts
    when the median of its outermost pixels is nearer to that colour than to all others and to white. With a size and a
    place too, "<size> <name>, <style> style, on a <colour> background, <place>", it counts when the prompted emoji is
    the nearest of its style, all drawn in that size, place and colour.
    """
    if not 1 <= count <= len(emoji):
        raise WuerstchenError(f"count is {count}: it must be from 1 to {len(emoji)}, the emoji of the data set")
    sampling = sampling or Sampling(replace(STAGE_C, cfg=model.defaults.cfg), STAGE_B, {})
    with model.drawn_with(sampling):
        yield from _figures(model, emoji, count, sampling)


def _figures(model: Wuerstchen, emoji: EmojiSet, count: int, sampling: Sampling) -> Iterator[str]:
    generator = random.Random("evaluation")
    pictures = [emoji.draw(i, generator)[0] for i in generator.sample(range(len(emoji)), count)]
    trips = {"Stage A round trip": _through_a, "compress, Stage B, Stage A": _through_b}
    for name, trip in trips.items():
        ratios = torch.cat([psnr(trip(model, batch, sampling), batch) for batch in _batches(pictures, name)])
        yield f"{name}: PSNR {ratios.mean():.2f} dB (lowest {ratios.min():.2f}, highest {ratios.max():.2f})"
    references = torch.stack([thumbnail(emoji.plain(i)) for i in tqdm(range(len(emoji)), desc="plain", leave=False)])
    prompted = generator.sample(range(len(emoji)), count)
    names = [plain_caption(emoji.entries[i]["name"], emoji.entries[i]["style"]) for i in prompted]

    def nearest(prompted: list[int], captions: list[str], name: str) -> list[bool]:
        images = _draw(model, captions, emoji.size, name, sampling)
        return [is_nearest(image, i, emoji, references) for i, image in zip(prompted, images, strict=True)]

    hits = nearest(prompted, names, "text to picture")
    for style in dict.fromkeys(emoji.entries[i]["style"] for i in prompted):
        own = [hit for i, hit in zip(prompted, hits, strict=True) if emoji.entries[i]["style"] == style]
        yield f"text to picture, {style}: {sum(own)} of {len(own)} nearest to the prompted emoji"
    yield f"text to picture: top-1 {sum(hits) / count:.1%} of {count} prompts"

    known = [i for i, entry in enumerate(emoji.entries) if len(entry["keywords"]) >= KEYWORDS]
    prompted = generator.sample(known, min(count, len(known)))
    keywords = [keyword_caption(tuple(emoji.entries[i]["keywords"]), emoji.entries[i]["style"]) for i in prompted]
    hits = nearest(prompted, keywords, "keywords to picture")
    yield f"keywords to picture: top-1 {sum(hits) / len(hits):.1%} of {len(hits)} prompts"

    colours = [generator.choice(list(COLOURS)) for _ in names]
    coloured = [f"{name}, on {with_article(colour)} background" for name, colour in zip(names, colours, strict=True)]
    seen = [_background(image) for image in _draw(model, coloured, emoji.size, "backgrounds", sampling)]
    hits = [there == asked for there, asked in zip(seen, colours, strict=True)]
    yield f"background: {sum(hits) / count:.1%} of {count} pictures are on the colour that was asked for"

    prompted = generator.sample(range(len(emoji)), count)
    asked = [(generator.choice(PLACEABLE), generator.choice(list(PLACES)), generator.choice(list(COLOURS)))
             for _ in prompted]  # fmt: skip
    captions = [_placed_caption(emoji, i, *how) for i, how in zip(prompted, asked, strict=True)]
    small = Thumbnails(emoji)
    hits = [
        small.is_nearest(image, i, *how)
        for image, i, how in zip(
            _draw(model, captions, emoji.size, "sizes and places", sampling), prompted, asked, strict=True
        )
    ]
    yield f"name, background, size and place: top-1 {sum(hits) / count:.1%} of {count} prompts"


def _placed_caption(emoji: EmojiSet, i: int, size: str, place: str, colour: str) -> str:
    entry = emoji.entries[i]
    subject = plain_caption(f"{size} {entry['name']}", entry["style"])
    return f"{subject}, on {with_article(colour)} background, {place}"


def _batches(pictures: list[Tensor], name: str) -> Iterator[Tensor]:
    """(B, H, W, 3) batches"""
    for start in tqdm(range(0, len(pictures), BATCH), desc=name, leave=False):
        yield rearrange(pictures[start : start + BATCH], "b c h w -> b h w c")


def _through_a(model: Wuerstchen, images: Tensor, sampling: Sampling) -> Tensor:
    return pipeline.decode(model.stage_a, pipeline.encode(model.stage_a, images), _geometry(images))


def _through_b(model: Wuerstchen, images: Tensor, sampling: Sampling) -> Tensor:
    semantic = pipeline.compress(model.semantic_compressor, images)
    latent = pipeline.sample_stage_b(model.stage_b, semantic, _geometry(images), options=sampling.stage_b)
    return pipeline.decode(model.stage_a, latent, _geometry(images))


def _geometry(images: Tensor) -> Geometry:
    return Geometry(width=images.shape[2], height=images.shape[1])


def _draw(model: Wuerstchen, captions: list[str], side: int, name: str, sampling: Sampling) -> Iterator[Tensor]:
    """A picture (side, side, 3) for each caption."""
    geometry = Geometry(side, side)
    empty = model.text_encoder_c([""])
    for start in tqdm(range(0, len(captions), BATCH), desc=name, leave=False):
        batch = captions[start : start + BATCH]
        latent = torch.zeros(len(batch), model.stage_c.config.latent_channels, *geometry.stage_c)
        text_c = model.text_encoder_c(batch)
        semantic = pipeline.sample_stage_c(model.stage_c, latent, text_c, empty, sampling.stage_c, seed=start)
        text_b = None if model.text_encoder_b is None else model.text_encoder_b(batch)
        latent = pipeline.sample_stage_b(
            model.stage_b, semantic, geometry, text_b, options=sampling.stage_b, seed=start
        )
        yield from pipeline.decode(model.stage_a, latent, geometry)


def is_nearest(image: Tensor, i: int, emoji: EmojiSet, references: Tensor) -> bool:
    """Whether no plain picture of its style is nearer to the image (H, W, 3) than that of emoji `i`."""
    likeness = references @ thumbnail(rearrange(image, "h w c -> c h w"))
    rivals = torch.tensor([entry["style"] == emoji.entries[i]["style"] for entry in emoji.entries])
    return bool(likeness[i] >= likeness[rivals].max())


class Thumbnails:
    """All emoji at SIDE pixels a side, to be drawn anywhere and compared with a picture."""

    def __init__(self, emoji: EmojiSet):
        self.emoji = emoji
        pictures = (torch.from_numpy(np.array(one)).permute(2, 0, 1)[None].float() / 255 for one in emoji.pictures)
        self.pictures = torch.cat([F.interpolate(one, size=(SIDE, SIDE), mode="area") for one in pictures])

    def is_nearest(self, image: Tensor, i: int, size: str, place: str, colour: str) -> bool:
        """Whether of its style, drawn in this size, place and colour, no emoji is nearer to the image (H, W, 3) than
        emoji `i`."""
        rivals = [j for j, entry in enumerate(self.emoji.entries) if entry["style"] == self.emoji.entries[i]["style"]]
        likeness = self.arranged(rivals, size, place, colour) @ thumbnail(rearrange(image, "h w c -> c h w"))
        return bool(likeness[rivals.index(i)] >= likeness.max())

    def arranged(self, rows: list[int], size: str, place: str, colour: str) -> Tensor:
        """The emoji of these numbers as unit vectors (N, 3 * SIDE * SIDE), in the middle of the size's and place's
        ranges."""
        scale = sum(SIZES[size]) / 2
        side = round(scale * SIDE)
        left, top = (round(share * (SIDE - side)) for share in PLACES[place])
        small = F.interpolate(self.pictures[rows], size=(side, side), mode="bilinear", antialias=True)
        pictures = torch.tensor(COLOURS[colour])[:, None, None].expand(len(rows), 3, SIDE, SIDE).clone()
        pictures[:, :, top : top + side, left : left + side] *= 1 - small[:, 3:]
        pictures[:, :, top : top + side, left : left + side] += small[:, :3]
        return F.normalize(pictures.flatten(1), dim=1)


def _background(image: Tensor) -> str:
    """The name of the colour at the edges of an image (H, W, 3)."""
    inside = torch.zeros(image.shape[:2], dtype=torch.bool)
    inside[EDGE:-EDGE, EDGE:-EDGE] = True
    colour = image[~inside].median(dim=0).values
    names = {"white": (1.0, 1.0, 1.0)} | COLOURS
    return min(names, key=lambda name: (colour - torch.tensor(names[name])).norm())


def thumbnail(picture: Tensor) -> Tensor:
    """(3, H, W) -> its 64x64 pixels as a unit vector"""
    small = F.interpolate(picture[None], size=(SIDE, SIDE), mode="area")
    return F.normalize(small.flatten(), dim=0)
