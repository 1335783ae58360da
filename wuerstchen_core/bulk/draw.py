"""The stages on batches whose pictures have prompts and seeds of their own."""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.text_encoder import TextEncoder
from ..pipeline import Wuerstchen, decode, sample_stage_b, sample_stage_c
from .lines import Line, stage_b_options, stage_c_options
from .output import load_latent

TEXTS = 512  # that are kept, at least


@dataclass
class Painter:
    """A set of networks, and the texts that it has read: each is encoded alone, so that no other one changes it."""

    model: Wuerstchen
    _texts: OrderedDict[tuple[int, str], Tensor] = field(default_factory=OrderedDict, init=False)

    def at_work(self, network: nn.Module) -> AbstractContextManager:
        return nullcontext() if self.model.offload is None else self.model.offload(network)

    def lengths(self, line: Line) -> tuple[int, ...]:
        """How many chunks of text the line has for each stage. Raises WuerstchenError if a text cannot be read."""
        encoder = self.model.text_encoder_c
        return tuple(
            encoder.tokenize(texts)[0].shape[1]
            for texts in (_texts(line, line.settings["cfg_c"] != 1), _texts(line, line.settings["cfg_b"] != 1))
        )

    def read(self, encoder: TextEncoder | None, lines: Sequence[Line]) -> None:
        """Encodes the texts of lines that were not read yet, for the stages that this encoder is for."""
        if encoder is None:
            return
        guided = [name for name in ("cfg_c", "cfg_b") if encoder is getattr(self.model, f"text_encoder_{name[-1]}")]
        texts = {text for line in lines for name in guided for text in _texts(line, line.settings[name] != 1)} | {""}
        new = [text for text in sorted(texts) if (id(encoder), text) not in self._texts]
        if new:
            with self.at_work(encoder):
                for text in new:
                    self._texts[id(encoder), text] = encoder([text])
        for text in texts:
            self._texts.move_to_end((id(encoder), text))
        while len(self._texts) > max(TEXTS, 4 * len(lines) + 2):  # a prompt and a negative for each of two encoders
            self._texts.popitem(last=False)

    def states(self, encoder: TextEncoder | None, lines: Sequence[Line], cfg: str) -> tuple[Tensor | None, ...]:
        """The texts and, with guidance, the negative ones, (B, L, width) each; None where there is no encoder."""
        if encoder is None:
            return None, None
        guided = lines[0].settings[cfg] != 1
        pairs = [[self._texts[id(encoder), text] for text in _texts(line, guided)] for line in lines]
        empty = self._texts[id(encoder), ""]
        longest = max(text.shape[1] for pair in pairs for text in pair)
        columns = [torch.cat([_filled(text, empty, longest) for text in column]) for column in zip(*pairs, strict=True)]
        return (*columns, None)[:2]

    def stage_c(self, lines: Sequence[Line]) -> Tensor:
        """-> latents (B, 16, p, q), with Stage C on the device"""
        model, first = self.model, lines[0]
        text, negative = self.states(model.text_encoder_c, lines, "cfg_c")
        assert text is not None
        channels = model.stage_c.config.latent_channels
        start = torch.zeros(len(lines), channels, *first.geometry.stage_c, device=model.device)
        seeds = [line.settings["seed"] for line in lines]
        options = stage_c_options(first.settings)
        return sample_stage_c(model.stage_c, start, text, negative, options, seeds=seeds)

    def load(self, lines: Sequence[Line]) -> Tensor:
        """-> latents (B, 16, p, q) that were drawn before"""
        return torch.stack([load_latent(line.latent) for line in lines if line.latent]).to(self.model.device)

    def stage_b(self, lines: Sequence[Line], semantic: Tensor) -> Tensor:
        """latents of Stage C -> those of Stage A (B, 4, h, w), with Stage B on the device"""
        model, first = self.model, lines[0]
        text, negative = self.states(model.text_encoder_b, lines, "cfg_b")
        return sample_stage_b(
            model.stage_b,
            semantic,
            first.geometry,
            text,
            negative,
            stage_b_options(first.settings),
            seeds=[line.seed_b for line in lines],
            tile=first.settings.get("tile"),
        )

    def stage_a(self, lines: Sequence[Line], latent: Tensor) -> Tensor:
        """latents of Stage A (B, 4, h, w) -> pictures (B, H, W, 3), with Stage A on the device"""
        return decode(self.model.stage_a, latent, lines[0].geometry, tile=lines[0].settings.get("tile"))


def _texts(line: Line, guided: bool) -> list[str]:
    return [line.settings["prompt"], *[line.settings["negative_prompt"]] * guided]


def _filled(text: Tensor, empty: Tensor, length: int) -> Tensor:
    """With the states of as many empty chunks as it lacks, as the text encoder fills the shorter one of two."""
    return torch.cat([text, empty.repeat(1, (length - text.shape[1]) // empty.shape[1], 1)], dim=1)
