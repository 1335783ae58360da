"""Stage C beside a single-stage baseline: what is counted, and that both are trained and measured alike."""

import json
from functools import partial

import pytest
import torch

import wuerstchen_core as w
from wuerstchen_core.cli import main
from wuerstchen_core.diffusion.options import SamplingOptions
from wuerstchen_core.mini import efficiency
from wuerstchen_core.mini.efficiency import CONTENDERS, operations_of_step, recognised
from wuerstchen_core.mini.evaluation import thumbnail


def test_operations_of_stage_cs_step_by_hand():
    """2 for a multiplication and an addition; the gradient takes twice the forward pass, but that of the input that
    needs none. Depthwise convolutions and attention are counted by their formulas."""
    c, depth, text, tokens, side = 256, 4, 192, 24, 6
    batch, seen = CONTENDERS["Stage C"].batch, CONTENDERS["Stage C"].batch * 2
    positions, keys = side**2, side**2 + tokens
    per_token = depth * 2 * c * c  # the text's own map, to a block's width; k and v are the attention's, below
    mlp = depth * positions * (2 * 2 * c * 4 * c + 2 * 9 * c)
    attention = depth * (positions * 2 * c * c * 4 + 2 * 2 * positions * keys * c)
    text_keys = depth * tokens * 2 * 2 * c * c  # once for all levels
    time = depth * 2 * 64 * 2 * c
    forward = seen * (mlp + attention + time + positions * 2 * (16 * c + c * 32))
    forward += batch * (text_keys + tokens * (per_token + 2 * (text * c + c * c)))
    assert operations_of_step(CONTENDERS["Stage C"]) == pytest.approx(3 * forward, rel=0.01)


def test_a_step_costs_both_the_same():
    ours, theirs = (operations_of_step(contender) for contender in CONTENDERS.values())
    assert ours == pytest.approx(theirs, rel=0.02)


def test_recognised_is_the_share_of_pictures_nearest_to_their_own():
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    references = torch.stack([thumbnail(picture) for picture in pictures])
    order = [0, 2, 1, 3]
    assert recognised((pictures[i].permute(1, 2, 0) for i in order), references) == 0.5
    assert recognised((picture.permute(1, 2, 0) for picture in pictures), references) == 1.0


def test_the_text_encoder_knows_nothing_and_is_always_the_same(emoji, tmp_path):
    states = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        torch.manual_seed(len(states))
        encoder = efficiency.prepare(efficiency.EmojiSet(emoji), [3, 4], folder)
        states.append(encoder(["red disc, noto style", "blue disc, noto style"]))
    assert torch.equal(*states) and not torch.allclose(states[0][0], states[0][1])
    assert (tmp_path / "a/pictures/0001.txt").read_text() == "green disc, noto style"


def test_the_command_trains_measures_and_goes_on(emoji, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    small = {name: contender._replace(batch=2) for name, contender in CONTENDERS.items()}
    monkeypatch.setattr(efficiency, "CONTENDERS", small)
    monkeypatch.setattr(efficiency, "SamplingOptions", partial(SamplingOptions, steps=2))
    work = tmp_path / "work"
    arguments = ["evaluate", "efficiency", str(emoji), str(work), "--count", "3", "--budgets"]
    assert main([*arguments, "0.003"]) == 0
    rows = json.loads((work / "efficiency.json").read_text())["rows"]
    assert [(row["network"], row["steps"], row["pictures"]) for row in rows] == [
        ("Stage C", 1, 2),
        ("baseline", 1, 2),
    ]
    assert all(0.002 < row["operations"] / 1e12 < 0.005 and 0 <= row["top-1"] <= 1 for row in rows)
    assert w.load_stage_c(work / "stage-c" / "stage_c.safetensors").config.width == 256
    assert (work / "efficiency.png").stat().st_size > 1000
    capsys.readouterr()
    stamps = [(work / stage / "checkpoint.pt").stat().st_mtime_ns for stage in ("stage-c", "stage-b")]
    assert main([*arguments, "0.003"]) == 0  # all is there
    assert stamps == [(work / stage / "checkpoint.pt").stat().st_mtime_ns for stage in ("stage-c", "stage-b")]
    for wrong, says in ((["-1"], "budgets are numbers above 0"), (["0.003", "--count", "2"], "of 3 emoji, not of 2")):
        assert main([*arguments, *wrong]) == 2
        assert says in capsys.readouterr().err
    assert main([*arguments, "1", "--count", "9"]) == 2
    assert "count is 9: it must be from 2 to 3" in capsys.readouterr().err
