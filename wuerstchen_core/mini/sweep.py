"""What the mini's stages draw by each solver, schedule and number of steps."""

import random
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from .. import pipeline
from ..geometry import Geometry
from ..pipeline import Progress, Wuerstchen
from ..reports.sweep import Draw, Figures, Setting
from ..util.checks import whole_number
from ..util.errors import WuerstchenError
from .captions import plain_caption
from .emoji import EmojiSet
from .evaluation import is_nearest, psnr, thumbnail

BATCH = 48


def stage_c_draws(
    model: Wuerstchen, emoji: EmojiSet, count: int, draws: int, cfg: float | None = None
) -> tuple[Draw, Figures]:
    """Stage C, `draws` latents of each of `count` plain prompts, guided by `cfg` or as suits the model.

    `top-1`: the share that the previewer shows nearer to the prompted emoji's plain picture than to that of any other
    of its style.
    """
    if model.previewer is None:
        raise WuerstchenError("the sweep of Stage C looks at its latents by a previewer, which this model has none of")
    previewer, side = model.previewer, Geometry(emoji.size, emoji.size).stage_c
    prompted = _sample(emoji, count)
    cfg = model.defaults.cfg if cfg is None else cfg
    text = model.text_encoder_c([plain_caption(emoji.entries[i]["name"], emoji.entries[i]["style"]) for i in prompted])
    text, empty = text.repeat_interleave(draws, dim=0), model.text_encoder_c([""])
    plain = torch.stack([thumbnail(emoji.plain(i)) for i in range(len(emoji))])

    def draw(setting: Setting, seed: int) -> Tensor:
        def part(rows: range, progress: Progress) -> Tensor:
            start = torch.zeros(len(rows), model.stage_c.config.latent_channels, *side)
            options = {"cfg": cfg, "seed": seed, "batch_index": list(rows), "progress": progress, **vars(setting)}
            return pipeline.sample_stage_c(model.stage_c, start, text[rows.start : rows.stop], empty, **options)

        return _sampled(part, count * draws, setting).unflatten(0, (count, draws))

    def figures(latents: Tensor) -> dict[str, float]:
        images = pipeline.preview(previewer, latents.flatten(0, 1))
        wanted = [i for i in prompted for _ in range(draws)]
        hits = [is_nearest(image, i, emoji, plain) for image, i in zip(images, wanted, strict=True)]
        return {"top-1": sum(hits) / len(hits)}

    return draw, figures


def stage_b_draws(model: Wuerstchen, emoji: EmojiSet, count: int, draws: int) -> tuple[Draw, Figures]:
    """Stage B, `draws` latents of each of `count` compressed pictures, with placements and colours of all kinds.

    `PSNR`: in dB, of Stage A's picture of the latent to the one that was compressed. `detail`: the mean size of the
    picture's Laplacian, as a share of that of the picture that was compressed.
    """
    generator = random.Random("sweep")
    pictures = torch.stack([emoji.draw(i, generator)[0] for i in _sample(emoji, count)])
    images = rearrange(pictures, "b c h w -> b h w c").repeat_interleave(draws, dim=0)
    geometry = Geometry(emoji.size, emoji.size)
    semantic = torch.cat(
        [pipeline.compress(model.semantic_compressor, images[rows.start : rows.stop]) for rows in _batches(len(images))]
    )

    def draw(setting: Setting, seed: int) -> Tensor:
        def part(rows: range, progress: Progress) -> Tensor:
            options = {"seed": seed, "batch_index": list(rows), "progress": progress, **vars(setting)}
            return pipeline.sample_stage_b(model.stage_b, semantic[rows.start : rows.stop], geometry, **options)

        return _sampled(part, len(images), setting).unflatten(0, (count, draws))

    def figures(latents: Tensor) -> dict[str, float]:
        flat = latents.flatten(0, 1)
        decoded = torch.cat(
            [pipeline.decode(model.stage_a, flat[rows.start : rows.stop], geometry) for rows in _batches(len(flat))]
        )
        return {
            "PSNR": psnr(decoded, images).mean().item(),
            "detail": (_detail(decoded) / _detail(images)).item(),
        }

    return draw, figures


def _sample(emoji: EmojiSet, count: int) -> list[int]:
    whole_number("count", count, 1, len(emoji))
    return random.Random("emoji of the sweep").sample(range(len(emoji)), count)


def _batches(count: int) -> list[range]:
    return [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]


def _sampled(part: Callable[[range, Progress], Tensor], count: int, setting: Setting) -> Tensor:
    batches, name = _batches(count), f"{setting.steps} steps of {setting.sampler}, {setting.schedule}"
    with tqdm(total=setting.steps * len(batches), desc=name, unit="step", leave=False) as bar:
        return torch.cat([part(rows, lambda *_: bar.update()) for rows in batches])


def _detail(images: Tensor) -> Tensor:
    inner = images[:, 1:-1, 1:-1]
    around = images[:, :-2, 1:-1] + images[:, 2:, 1:-1] + images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    return (4 * inner - around).abs().mean()
