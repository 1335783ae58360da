"""The mini's figures."""

import pytest
import torch

from wuerstchen_core.mini.emoji import COLOURS, EmojiSet
from wuerstchen_core.mini.evaluation import evaluate, psnr


def test_psnr_is_its_formula():
    truth = torch.zeros(2, 4, 4, 3)
    images = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert psnr(images, truth).tolist() == pytest.approx([20, 40], abs=1e-3)


def test_a_model_that_draws_what_is_asked_scores_full_marks(emoji, tiny, monkeypatch):
    """Stage A draws, in place of the decoded latent, the picture that the text encoder was asked for."""
    data = EmojiSet(emoji)
    asked = []
    original = type(tiny.text_encoder_b).forward

    def remember(self, prompts):
        asked[:] = prompts
        return original(self, prompts)

    def picture(prompt):
        subject, style, *rest = prompt.replace("round, ", "").split(", ")
        (i,) = (
            i
            for i, entry in enumerate(data.entries)
            if entry["name"].startswith(subject) and style == f"{entry['style']} style"
        )
        colour = rest[0].removesuffix(" background").split()[-1] if rest else None
        return data.compose(i, COLOURS.get(colour, (1.0, 1.0, 1.0))).permute(1, 2, 0)

    def draw(stage_a, latent, geometry):
        return torch.stack([*map(picture, asked)])

    monkeypatch.setattr(type(tiny.text_encoder_b), "forward", remember)
    monkeypatch.setattr("wuerstchen_core.pipeline.sample_stage_c", lambda *a, **k: torch.zeros(6, 16, 6, 6))
    monkeypatch.setattr("wuerstchen_core.pipeline.sample_stage_b", lambda *a, **k: None)
    monkeypatch.setattr("wuerstchen_core.pipeline.decode", draw)
    monkeypatch.setattr("wuerstchen_core.mini.evaluation._through_a", lambda model, images, _: images + 0.1)
    monkeypatch.setattr("wuerstchen_core.mini.evaluation._through_b", lambda model, images, _: images + 0.01)
    lines = list(evaluate(tiny, data, 6))
    assert "PSNR 20.00 dB" in lines[0] and "PSNR 40.00 dB" in lines[1]
    assert lines[-3:] == [
        "text to picture: top-1 100.0% of 6 prompts",
        "keywords to picture: top-1 100.0% of 6 prompts",
        "background: 100.0% of 6 pictures are on the colour that was asked for",
    ]

    # Green stays green when red and blue change places, and so do black and gray.
    monkeypatch.setattr("wuerstchen_core.pipeline.decode", lambda *a: draw(*a).flip(-1))
    lines = list(evaluate(tiny, data, 6))
    assert "top-1 33.3%" in lines[-3] and "top-1 33.3%" in lines[-2] and "100.0%" not in lines[-1]
