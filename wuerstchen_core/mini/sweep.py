"""What the mini's stages draw by each solver, schedule and number of steps."""

import random
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from .. import pipeline
from ..geometry import Geometry
from ..pipeline import Wuerstchen
from ..reports.sweep import Draw, Figure, Setting
from ..util.checks import whole_number
from ..util.errors import WuerstchenError
from .captions import plain_caption
from .emoji import EmojiSet
from .evaluation import is_nearest, psnr, thumbnail

BATCH = 48


def stage_c_draws(
    model: Wuerstchen, emoji: EmojiSet, count: int, draws: int, cfg: float
) -> tuple[Draw, dict[str, Figure]]:
    """Stage C, `draws` latents of each of `count` plain prompts.

    `top-1`: the share that the previewer shows nearer to the prompted emoji's plain picture than to that of any other
    of its style.
    """
    if model.previewer is None:
        raise WuerstchenError("the sweep of Stage C looks at its latents by a previewer, which this model has none of")
    previewer, side = model.previewer, Geometry(emoji.size, emoji.size).stage_c
    prompted = _sample(emoji, count)
    text = model.text_encoder_c([plain_caption(emoji.entries[i]["name"], emoji.entries[i]["style"]) for i in prompted])
    text, empty = text.repeat_interleave(draws, dim=0), model.text_encoder_c([""])
    plain = torch.stack([thumbnail(emoji.plain(i)) for i in range(len(emoji))])

    def draw(setting: Setting, seed: int) -> Tensor:
        def part(rows: range) -> Tensor:
            start = torch.zeros(len(rows), model.stage_c.config.latent_channels, *side)
            options = {"cfg": cfg, "seed": seed, "batch_index": list(rows), **vars(setting)}
            return pipeline.sample_stage_c(model.stage_c, start, text[rows.start : rows.stop], empty, **options)

        return _in_batches(part, count * draws).unflatten(0, (count, draws))

    def top1(latents: Tensor) -> float:
        images = pipeline.preview(previewer, latents.flatten(0, 1))
        wanted = [i for i in prompted for _ in range(draws)]
        return sum(is_nearest(image, i, emoji, plain) for image, i in zip(images, wanted, strict=True)) / len(wanted)

    return draw, {"top-1": top1}


def stage_b_draws(model: Wuerstchen, emoji: EmojiSet, count: int, draws: int) -> tuple[Draw, dict[str, Figure]]:
    """Stage B, `draws` latents of each of `count` compressed pictures, with placements and colours of all kinds.

    `PSNR`: in dB, of Stage A's picture of the latent to the one that was compressed. `detail`: the mean size of the
    picture's Laplacian, as a share of that of the picture that was compressed.
    """
    generator = random.Random("sweep")
    pictures = torch.stack([emoji.draw(i, generator)[0] for i in _sample(emoji, count)])
    images = rearrange(pictures, "b c h w -> b h w c").repeat_interleave(draws, dim=0)
    geometry = Geometry(emoji.size, emoji.size)
    semantic = _in_batches(
        lambda rows: pipeline.compress(model.semantic_compressor, images[rows.start : rows.stop]), len(images)
    )

    def draw(setting: Setting, seed: int) -> Tensor:
        def part(rows: range) -> Tensor:
            options = {"seed": seed, "batch_index": list(rows), **vars(setting)}
            return pipeline.sample_stage_b(model.stage_b, semantic[rows.start : rows.stop], geometry, **options)

        return _in_batches(part, len(images)).unflatten(0, (count, draws))

    def decoded(latents: Tensor) -> Tensor:
        flat = latents.flatten(0, 1)
        return _in_batches(
            lambda rows: pipeline.decode(model.stage_a, flat[rows.start : rows.stop], geometry), len(flat)
        )

    return draw, {
        "PSNR": lambda latents: psnr(decoded(latents), images).mean().item(),
        "detail": lambda latents: (_detail(decoded(latents)) / _detail(images)).item(),
    }


def _sample(emoji: EmojiSet, count: int) -> list[int]:
    whole_number("count", count, 1, len(emoji))
    return random.Random("emoji of the sweep").sample(range(len(emoji)), count)


def _in_batches(part: Callable[[range], Tensor], count: int) -> Tensor:
    return torch.cat([part(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH)])


def _detail(images: Tensor) -> Tensor:
    inner = images[:, 1:-1, 1:-1]
    around = images[:, :-2, 1:-1] + images[:, 2:, 1:-1] + images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    return (4 * inner - around).abs().mean()
