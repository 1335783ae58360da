"""What the sweep draws: the same latents in any batches, guided as asked, and the figures of what was compressed."""

import json
import math

import pytest
import torch
from PIL import Image

from tests.previewers import SMALL
from wuerstchen_core import pipeline
from wuerstchen_core.cli import main
from wuerstchen_core.mini import evaluation, sweep
from wuerstchen_core.mini.emoji import EmojiSet
from wuerstchen_core.models.previewer import Previewer
from wuerstchen_core.reports.sweep import Setting
from wuerstchen_core.util.errors import WuerstchenError

SETTING = Setting("dpmpp_2m_sde", "even", 2)


@pytest.fixture
def watched(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "previewer", Previewer(SMALL))
    return tiny


@pytest.fixture
def data(emoji):
    return EmojiSet(emoji)


@pytest.mark.parametrize("draws_of", [sweep.stage_c_draws, sweep.stage_b_draws])
def test_the_latents_do_not_depend_on_the_batches(watched, data, draws_of, monkeypatch):
    draw, _ = draws_of(watched, data, 2, 2)
    whole = draw(SETTING, 5)
    monkeypatch.setattr(sweep, "BATCH", 3)
    draw, _ = draws_of(watched, data, 2, 2)
    assert whole.shape[:2] == (2, 2)
    assert (draw(SETTING, 5) - whole).norm() < 1e-5 * whole.norm()
    assert not torch.allclose(whole[:, 0], whole[:, 1]) and not torch.allclose(draw(SETTING, 6), whole)


def test_the_guidance_is_the_model_s_unless_it_is_asked_for(watched, data, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pipeline, "sample_stage_c", lambda *a, cfg, **k: asked.append(cfg) or torch.zeros(len(a[1]), 16, 6, 6)
    )
    for cfg in (None, 7.0):
        sweep.stage_c_draws(watched, data, 1, 2, cfg)[0](SETTING, 0)
    assert asked == [2.0, 7.0]
    monkeypatch.setattr(evaluation, "_figures", lambda model, emoji, count, sampling: iter([sampling.stage_c.cfg]))
    assert list(evaluation.evaluate(watched, data, 1)) == [2.0]


def test_top_1_counts_the_previews_nearest_to_the_prompted_emoji(watched, data, monkeypatch):
    _, figures = sweep.stage_c_draws(watched, data, 3, 2)
    prompted = sweep._sample(data, 3)
    shown = [data.plain(i).permute(1, 2, 0) for i in prompted for _ in range(2)]
    shown[0] = shown[0].flip(-1) if data.entries[prompted[0]]["name"] != "green disc" else 1 - shown[0]
    monkeypatch.setattr(pipeline, "preview", lambda previewer, latents: shown)
    assert figures(torch.zeros(3, 2, 16, 6, 6)) == {"top-1": pytest.approx(5 / 6)}


def test_psnr_and_detail_are_those_of_the_compressed_picture(tiny, data, monkeypatch):
    compressed = []
    monkeypatch.setattr(
        pipeline, "compress", lambda network, images: compressed.append(images) or torch.zeros(len(images), 16, 6, 6)
    )
    _, figures = sweep.stage_b_draws(tiny, data, 2, 2)
    monkeypatch.setattr(pipeline, "decode", lambda network, latent, geometry: compressed[0] * 0.5 + 0.25)
    pictures = compressed[0].double()
    expected = [10 * math.log10(1 / (0.5 * one - 0.25).square().mean().item()) for one in pictures]
    got = figures(torch.zeros(2, 2, 4, 64, 64))
    assert got["PSNR"] == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert got["detail"] == pytest.approx(0.5, rel=1e-4)


def test_stage_c_cannot_be_seen_without_a_previewer(tiny, data):
    with pytest.raises(WuerstchenError, match="previewer"):
        sweep.stage_c_draws(tiny, data, 1, 2)


def test_the_command_writes_the_guidance_that_it_drew_with(emoji, tmp_path):
    given = ["evaluate", "solvers", str(emoji), "--samplers", "ddim", "--schedules", "even", "--steps", "1", "2"]
    output = tmp_path / "solvers.json"
    assert main([*given, "--count", "1", "--draws", "2", "--reference", "3", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["cfg"] == 2.0 and [row["steps"] for row in found["rows"]] == [1, 2]
    assert Image.open(output.with_suffix(".png")).width > 600


def test_the_command_refuses_a_guidance_of_stage_b(emoji, tmp_path, capsys):
    assert main(["evaluate", "solvers", str(emoji), "--stage", "b", "--cfg", "3", "--output", str(tmp_path / "b.json")])
    assert "--cfg is Stage C's" in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()
