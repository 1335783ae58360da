"""What a sampler is given, checked before the network runs: latents, masks and the states of texts."""

import torch
from torch import Tensor

from ..util.errors import WuerstchenError
from ..util.finite import is_finite


def join_texts(stage: str, width: int, batch: int, text: Tensor, negative: Tensor | None, guided: bool) -> Tensor:
    """The text of every picture of the batch, then, with guidance, the negative of every one.

    A negative that is not used is checked all the same.
    """
    for given in (text, negative):
        if given is None:
            continue
        if given.dim() != 3 or given.numel() == 0:
            raise WuerstchenError(
                f"the text for {stage} has the shape {shape_text(given)}: it must be (1 or B, L, {width})"
            )
        if given.shape[-1] != width:
            raise WuerstchenError(
                f"{stage} was trained with a text encoder of width {width}, but this text comes from one of width "
                f"{given.shape[-1]}: encode it with the text encoder that belongs to {stage}"
            )
        if given.shape[0] not in (1, batch):
            raise WuerstchenError(
                f"the text for {stage} has {given.shape[0]} rows, but there are {batch} latents: give it one row, or "
                "one for each of them"
            )
        if not is_finite(given):
            raise WuerstchenError(f"the text for {stage} is not finite: run its text encoder in float32")
    halves = [text, negative] if guided and negative is not None else [text]
    longest = max(half.shape[1] for half in halves)
    return torch.cat([_to_length(half, longest).expand(batch, -1, -1) for half in halves])


def _to_length(text: Tensor, length: int) -> Tensor:
    """The shorter of two texts is repeated, as the encoding of a text in chunks would be."""
    repeats = -(-length // text.shape[1])
    return text.repeat(1, repeats, 1)[:, :length]


def check_latent(what: str, latent: Tensor, channels: int, sizes: tuple[int, ...] | None = None) -> None:
    """A latent (B, channels, rows, columns), where `sizes` are given with these for batch, rows and columns."""
    fits = latent.dim() == 4 and latent.shape[1] == channels and latent.numel() > 0
    if not fits or sizes and (latent.shape[0], *latent.shape[2:]) != sizes:
        batch, *sides = sizes or ("B", "rows", "columns")
        wanted = ", ".join(map(str, (batch, channels, *sides)))
        raise WuerstchenError(f"{what}: the latent has the shape {shape_text(latent)}, not ({wanted})")


def checked_mask(mask: Tensor, latent: Tensor) -> Tensor:
    wanted = [(count, 1, *latent.shape[2:]) for count in (1, latent.shape[0])]
    if tuple(mask.shape) not in wanted:
        raise WuerstchenError(
            f"the mask has the shape {shape_text(mask)}, but the latent {shape_text(latent)} needs {wanted[0]}"
        )
    mask = mask.to(latent)
    if not 0 <= mask.min() <= mask.max() <= 1:
        raise WuerstchenError(f"the mask has values from {mask.min():g} to {mask.max():g}: they must be in [0, 1]")
    return mask


def shape_text(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
