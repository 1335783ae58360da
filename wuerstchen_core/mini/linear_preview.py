"""The linear previewer that ships with the pack, fitted to emoji."""

import random

import torch

from ..models.previewer import Previewer
from ..models.semantic_compressor import SemanticCompressor
from ..training.stages.conditioning import semantic
from ..training.stages.previewer import fit_linear_preview, small
from .emoji import EmojiSet


@torch.no_grad()
def linear_preview(emoji: EmojiSet, compressor: SemanticCompressor, count: int = 2000, seed: int = 0) -> Previewer:
    """The linear previewer for a compressor, fitted to `count` pictures of emoji, the same ones for each seed."""
    generator = random.Random(seed)
    latents, pictures = [], []
    for _ in range(count):
        image = emoji.draw(generator.randrange(len(emoji)), generator)[0][None]
        latents.append(semantic(compressor, image))
        pictures.append(small(image))
    return fit_linear_preview(torch.cat(latents), torch.cat(pictures))
