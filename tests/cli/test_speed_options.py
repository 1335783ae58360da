"""wuerstchen generate: --dtype and --compile."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import wuerstchen_core as w
from wuerstchen_core import pipeline
from wuerstchen_core.cli import main
from wuerstchen_core.util.precision import dtype_of

SMALL = ["--steps-c", "1", "--steps-b", "1", "--width", "64", "--height", "64"]


@pytest.fixture
def generate(tiny_folder):
    return lambda *arguments: main(
        ["generate", "a cat", "-o", "p.png", *SMALL, "--model", str(tiny_folder), *arguments]
    )


def told_and_drawn():
    with Image.open("p.png") as picture:
        return json.loads(picture.text["wuerstchen"]), np.array(picture)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_picture_is_drawn_in_the_precision_asked_for(generate, tiny_folder, monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)  # bfloat16 by default
    assert generate("--dtype", name) == 0
    told, drawn = told_and_drawn()
    assert told.get("dtype") == (None if name == "float32" else name)
    pipe = w.Wuerstchen.from_folder(tiny_folder, dtype=getattr(torch, name))
    assert dtype_of(pipe.stage_a) == getattr(torch, name)
    expected = pipe.generate("a cat", steps_c=1, steps_b=1, width=64, height=64)[0]
    assert np.array_equal(drawn, (expected * 255).round().byte().numpy())


def test_what_was_chosen_by_itself_is_in_the_picture_too(generate, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert generate() == 0 and told_and_drawn()[0]["dtype"] == "bfloat16"


def test_an_unknown_precision_is_one_line(generate, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate("--dtype", "half")
    error = capsys.readouterr().err
    assert "--dtype" in error and "float32" in error and error.count("\n") == 1 and len(error) < 500


def test_stages_c_b_and_a_are_compiled(generate, monkeypatch):
    compiled = []
    monkeypatch.setattr(pipeline, "compile_networks", compiled.extend)
    assert generate() == 0 and not compiled
    assert generate("--compile") == 0
    assert [type(network).__name__ for network in compiled] == ["Prior", "DiffNeXt", "VQGAN"]


def test_without_a_compiler_nothing_is_drawn(generate, monkeypatch, capsys):
    def compile_networks(networks):
        raise w.WuerstchenError("torch.compile does not work here")

    monkeypatch.setattr(pipeline, "compile_networks", compile_networks)
    assert generate("--compile") != 0
    assert "torch.compile does not work here" in capsys.readouterr().err
