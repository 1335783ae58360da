"""The embedded model's figures: is a picture the same after a round trip, and is what was asked for drawn?"""

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from .. import pipeline
from ..errors import WuerstchenError
from ..geometry import Geometry
from ..pipeline import Wuerstchen
from .captions import plain_caption
from .emoji import EmojiSet

BATCH = 10
SIDE = 64  # pixels a side in which a picture is compared with the data set's


def evaluate(model: Wuerstchen, emoji: EmojiSet, count: int) -> Iterator[str]:
    """The figures, a line each, on `count` pictures or prompts.

    The pictures of the round trips are drawn with placements and colours that training did not see. Prompts are the
    plain ones, "<name>, <style> style"; a picture counts when, of all plain pictures of the style, that of the
    prompted emoji is the nearest by the cosine similarity of 64x64 pixels, or as near as the nearest: a few emoji of a
    style have the same picture.
    """
    if not 1 <= count <= len(emoji):
        raise WuerstchenError(f"count is {count}: it must be from 1 to {len(emoji)}, the emoji of the data set")
    generator = random.Random("evaluation")
    pictures = [emoji.draw(i, generator)[0] for i in generator.sample(range(len(emoji)), count)]
    trips = {"Stage A round trip": _through_a, "compress, Stage B, Stage A": _through_b}
    for name, trip in trips.items():
        ratios = torch.cat([_psnr(trip(model, batch), batch) for batch in _batches(pictures, name)])
        yield f"{name}: PSNR {ratios.mean():.2f} dB (lowest {ratios.min():.2f}, highest {ratios.max():.2f})"
    prompted = generator.sample(range(len(emoji)), count)
    hits = _top_1(model, emoji, prompted)
    for style in dict.fromkeys(emoji.entries[i]["style"] for i in prompted):
        own = [hit for i, hit in zip(prompted, hits) if emoji.entries[i]["style"] == style]
        yield f"text to picture, {style}: {sum(own)} of {len(own)} nearest to the prompted emoji"
    yield f"text to picture: top-1 {sum(hits) / count:.1%} of {count} prompts"


def _batches(pictures: list[Tensor], name: str) -> Iterator[Tensor]:
    """(B, H, W, 3) batches"""
    for start in tqdm(range(0, len(pictures), BATCH), desc=name, leave=False):
        yield rearrange(pictures[start : start + BATCH], "b c h w -> b h w c")


def _through_a(model: Wuerstchen, images: Tensor) -> Tensor:
    return pipeline.decode(model.stage_a, pipeline.encode(model.stage_a, images), _geometry(images))


def _through_b(model: Wuerstchen, images: Tensor) -> Tensor:
    semantic = pipeline.compress(model.semantic_compressor, images)
    latent = pipeline.sample_stage_b(model.stage_b, semantic, _geometry(images))
    return pipeline.decode(model.stage_a, latent, _geometry(images))


def _geometry(images: Tensor) -> Geometry:
    return Geometry(width=images.shape[2], height=images.shape[1])


def _psnr(images: Tensor, truth: Tensor) -> Tensor:
    """(B, H, W, 3) in [0, 1] -> peak signal-to-noise ratio of each in dB (B,)"""
    return -10 * (images - truth).square().flatten(1).mean(dim=1).log10()


def _top_1(model: Wuerstchen, emoji: EmojiSet, prompted: list[int]) -> list[bool]:
    styles = [entry["style"] for entry in emoji.entries]
    plain = torch.stack([_thumbnail(emoji.plain(i)) for i in tqdm(range(len(emoji)), desc="plain", leave=False)])
    geometry = Geometry(emoji.size, emoji.size)
    empty = model.text_encoder_c([""])
    hits = []
    for start in tqdm(range(0, len(prompted), BATCH), desc="text to picture", leave=False):
        batch = prompted[start : start + BATCH]
        captions = [plain_caption(emoji.entries[i]["name"], emoji.entries[i]["style"]) for i in batch]
        latent = torch.zeros(len(batch), model.stage_c.config.latent_channels, *geometry.stage_c)
        semantic = pipeline.sample_stage_c(model.stage_c, latent, model.text_encoder_c(captions), empty, seed=start)
        latent = pipeline.sample_stage_b(model.stage_b, semantic, geometry, model.text_encoder_b(captions), seed=start)
        for i, image in zip(batch, pipeline.decode(model.stage_a, latent, geometry)):
            likeness = plain @ _thumbnail(rearrange(image, "h w c -> c h w"))
            rivals = torch.tensor([style == styles[i] for style in styles])
            hits.append((likeness[i] >= likeness[rivals].max()).item())
    return hits


def _thumbnail(picture: Tensor) -> Tensor:
    """(3, H, W) -> its 64x64 pixels as a unit vector"""
    small = F.interpolate(picture[None], size=(SIDE, SIDE), mode="area")
    return F.normalize(small.flatten(), dim=0)
