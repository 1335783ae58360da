"""The mini's recipe, from pictures to a model that draws."""

from dataclasses import replace

import pytest
import torch

import wuerstchen_core as w
from wuerstchen_core import cli
from wuerstchen_core.mini import recipe
from wuerstchen_core.mini.emoji import EmojiSet
from wuerstchen_core.training.command import CONFIGS
from wuerstchen_core.training.options import load

SHORT = {"batch": 2, "workers": 0, "sample_every": 0}


@pytest.fixture
def short(monkeypatch):
    for name, run in recipe.RUNS.items():
        monkeypatch.setitem(recipe.RUNS, name, replace(run, options={**run.options, **SHORT}))


def written(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_the_recipe_makes_a_set_that_draws(emoji, tmp_path, short, capsys):
    work = tmp_path / "work"
    assert cli.main(["train", "mini", str(emoji), str(work), "--steps", "2"]) == 0, capsys.readouterr().err
    model = w.Wuerstchen.from_folder(work)
    assert model.generate("red disc, noto style", steps_c=2, steps_b=2).shape == (1, 256, 256, 3)
    assert model.text_encoder_b is model.text_encoder_c and model.previewer is not None
    assert model.sampling().distilled
    for name, network in (("stage_a", model.stage_a), ("stage_b", model.stage_b), ("stage_c", model.stage_c),
                          ("text_encoder", model.text_encoder_c), ("previewer", model.previewer)):  # fmt: skip
        config = vars(network.config)
        for option, value in load(str(CONFIGS / "mini" / f"{name}.toml"))["network"].items():
            if option not in ("stage_a_scale", "scale_factor"):
                assert config[option] == (tuple(value) if isinstance(value, list) else value), (name, option)
    assert model.stage_b.config.stage_a_scale == model.stage_a.config.scale_factor
    assert w.load_previewer(work / "linear_preview.safetensors").config.widths == ()
    pictures = torch.stack([EmojiSet(emoji).plain(i) for i in range(6)])
    assert model.stage_a.encode(pictures).std().item() == pytest.approx(1, abs=0.35)
    assert {tensor.dtype for tensor in w.load_stage_c(work / "stage_c.safetensors", dtype=None).parameters()} == {
        torch.float16
    }

    before = written(work)
    (work / "stage_b.safetensors").unlink()
    assert cli.main(["train", "mini", str(emoji), str(work), "--steps", "2"]) == 0
    after = written(work)
    assert {name for name in after if after[name] != before[name]} == {"stage_b.safetensors"}
    assert cli.main(["evaluate", "emoji", str(emoji), "--model", str(work), "--count", "1"]) == 0
    assert "of 1 prompts" in capsys.readouterr().out


def test_each_run_starts_from_the_files_of_those_before_it(monkeypatch, emoji, tmp_path):
    asked = {}

    def train(stage, *, config, folder, data, **options):
        assert config == "mini"
        asked[folder.name] = stage, data, options
        folder.mkdir(parents=True)
        for name in recipe.RUNS[folder.name].gives:
            (folder / f"{name}.safetensors").write_text(folder.name)

    monkeypatch.setattr(recipe, "train", train)
    recipe.train_mini(emoji, tmp_path)
    assert list(asked) == list(recipe.RUNS)
    given = set()
    for name, run in recipe.RUNS.items():
        _, data, options = asked[name]
        files = {value for value in options.values() if str(value).endswith(".safetensors")}
        assert files <= {str(tmp_path / f"{name}.safetensors") for name in given}, name
        assert data == str(emoji) or name == "text_encoder" and data == f"{emoji}?variants={recipe.VARIANTS}"
        assert options["dtype"] == "float16"
        given |= set(run.gives.values())
    assert (tmp_path / "text_encoder.safetensors").read_text() == "stage_c"
    assert asked["stage_b"][2]["text_encoder"] == str(tmp_path / "text_encoder.safetensors")

    (tmp_path / "stage_b.safetensors").unlink()
    asked.clear()
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *arguments, **options: None)
    recipe.train_mini(emoji, tmp_path, steps=7)
    assert list(asked) == ["stage_b"] and asked["stage_b"][2]["steps"] == 7


def test_what_cannot_be_trained_is_told(emoji, tmp_path):
    with pytest.raises(w.WuerstchenError, match="the mini has no run 'decoder': choose one of stage_a"):
        recipe.train_mini(emoji, tmp_path, only="decoder")
    with pytest.raises(w.WuerstchenError, match="steps is 0"):
        recipe.train_mini(emoji, tmp_path, steps=0)
    with pytest.raises(w.WuerstchenError, match="no emoji data set in"):
        recipe.train_mini(tmp_path, tmp_path)
