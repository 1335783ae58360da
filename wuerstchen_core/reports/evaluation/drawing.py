"""The pictures of prompts, as `Wuerstchen.generate` draws them one by one."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import pipeline
from ...diffusion.options import SamplingOptions
from ...geometry import Geometry
from ...models.text_encoder import TextEncoder
from ...pipeline import Wuerstchen


class Batch(NamedTuple):
    """Prompts whose texts have the same length, by their numbers among all, and a seed for each."""

    numbers: list[int]
    prompts: list[str]
    seeds: list[int]


def batches(model: Wuerstchen, prompts: Sequence[str], seed: int, size: int) -> list[Batch]:
    """All prompts, at most `size` at a time. Prompt i has the seed `seed` + i, as in `wuerstchen generate --prompts`.

    Raises WuerstchenError if a prompt can't be read.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[model.text_encoder_c.tokenize([prompt])[0].shape[1]].append(i)
    parts = (numbers[start : start + size] for numbers in by_length.values() for start in range(0, len(numbers), size))
    return [Batch(part, [prompts[i] for i in part], [seed + i for i in part]) for part in parts]


def draw_latent(model: Wuerstchen, batch: Batch, geometry: Geometry, options: SamplingOptions) -> Tensor:
    """Stage C: -> latents (B, 16, p, q)"""
    text, negative = _read(model.text_encoder_c, batch.prompts)
    channels = model.stage_c.config.latent_channels
    start = torch.zeros(len(batch.prompts), channels, *geometry.stage_c, device=model.device)
    return pipeline.sample_stage_c(model.stage_c, start, text, negative, options, seeds=batch.seeds)


def finish(
    model: Wuerstchen,
    latent: Tensor,
    batch: Batch,
    geometry: Geometry,
    options: SamplingOptions,
    with_text: bool = True,
) -> Tensor:
    """Stages B and A: latents of Stage C -> pictures (B, H, W, 3) in [0, 1], on the CPU.

    Without text Stage B reads what it has where there is no prompt at all.
    """
    text = negative = None
    if with_text and model.text_encoder_b is not None:
        text, negative = _read(model.text_encoder_b, batch.prompts)
    sampled = pipeline.sample_stage_b(model.stage_b, latent, geometry, text, negative, options, seeds=batch.seeds)
    return pipeline.decode(model.stage_a, sampled, geometry).cpu()


@torch.inference_mode()
def _read(encoder: TextEncoder, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The states of prompts, (B, L, width), and of the empty one, (1, L, width)."""
    states = encoder([*prompts, ""])
    return states[:-1], states[-1:]
