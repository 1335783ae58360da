"""The mini's figures."""

import pytest
import torch

from wuerstchen_core.mini.emoji import COLOURS, PLACES, SIZES, EmojiSet
from wuerstchen_core.mini.evaluation import Thumbnails, evaluate, psnr, thumbnail


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
        subject, style, *rest = prompt.removeprefix("round, ").split(", ")
        size, place = SIZES.get(subject.split()[0]), PLACES.get(rest[-1] if rest else "")
        subject = subject.removeprefix("tiny ").removeprefix("small ")
        (i,) = (
            i
            for i, entry in enumerate(data.entries)
            if entry["name"].startswith(subject) and style == f"{entry['style']} style"
        )
        colour = rest[0].removesuffix(" background").split()[-1] if rest else None
        how = {}
        if size:
            scale = sum(size) / 2
            how = {"scale": scale, "centre": tuple(scale / 2 + share * (1 - scale) for share in place)}
        return data.compose(i, COLOURS.get(colour, (1.0, 1.0, 1.0)), **how).permute(1, 2, 0)

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
    assert lines[-4:] == [
        "text to picture: top-1 100.0% of 6 prompts",
        "keywords to picture: top-1 100.0% of 6 prompts",
        "background: 100.0% of 6 pictures are on the colour that was asked for",
        "name, background, size and place: top-1 100.0% of 6 prompts",
    ]

    # Green stays green when red and blue change places, and so do black and gray.
    monkeypatch.setattr("wuerstchen_core.pipeline.decode", lambda *a: draw(*a).flip(-1))
    lines = list(evaluate(tiny, data, 6))
    assert "top-1 33.3%" in lines[-4] and "top-1 33.3%" in lines[-3] and "100.0%" not in lines[-2]
    assert "100.0%" not in lines[-1]


def test_small_pictures_are_what_compose_draws(emoji):
    data = EmojiSet(emoji)
    small = Thumbnails(data)
    for i, size, place, colour in (
        (0, "small", "at the top", "teal"),
        (4, "tiny", "in the bottom right corner", "pink"),
    ):
        scale = sum(SIZES[size]) / 2
        centre = tuple(scale / 2 + share * (1 - scale) for share in PLACES[place])
        drawn = data.compose(i, COLOURS[colour], scale, centre)
        likeness = small.arranged(list(range(6)), size, place, colour) @ thumbnail(drawn)
        assert likeness.argmax() == i and likeness[i] > 0.995
        assert small.is_nearest(drawn.permute(1, 2, 0), i, size, place, colour)
        wrong = data.compose(i - 1 if i % 3 else i + 1, COLOURS[colour], scale, centre)
        assert not small.is_nearest(wrong.permute(1, 2, 0), i, size, place, colour)
