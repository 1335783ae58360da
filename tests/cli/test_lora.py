"""LoRAs on the command line."""

import json

import numpy as np
import pytest
from PIL import Image

import wuerstchen_core as w
from tests.loras import EVERYTHING, adapter
from wuerstchen_core.checkpoints.describe import describe
from wuerstchen_core.cli import main


def drawn(model, *loras):
    with w.apply_loras(model.stage_c, loras):
        picture = model.generate("a cat", steps_c=2, steps_b=2)[0]
    return (picture * 255).round().byte().numpy()


def test_generate_takes_loras_with_their_strengths(tiny, tiny_folder, style, tmp_path):
    few = ["--steps-c", "2", "--steps-b", "2", "--model", str(tiny_folder)]
    odd = tmp_path / "C:odd:2.5x"
    odd.mkdir()
    (odd / "a:b.safetensors").write_bytes((tmp_path / "style.safetensors").read_bytes())
    plain = drawn(tiny)
    for number, (given, total, told) in enumerate(
        [
            (["style.safetensors"], 1.0, "style.safetensors:1"),
            (["style.safetensors:0.8"], 0.8, "style.safetensors:0.8"),
            (["style.safetensors:-.5", f"{odd}/a:b.safetensors:2"], 1.5, "style.safetensors:-0.5, a:b.safetensors:2"),
            ([f"{odd}/a:b.safetensors"], 1.0, "a:b.safetensors:1"),
        ]
    ):
        arguments = [argument for text in given for argument in ("--lora", text)]
        assert main(["generate", "a cat", "-o", f"{number}.png", *arguments, *few]) == 0
        with Image.open(f"{number}.png") as picture:
            seen = np.array(picture).astype(int)
            assert json.loads(picture.text["wuerstchen"])["loras"] == told.split(", ")
        assert np.abs(seen - drawn(tiny, (style, total))).max() <= 1
        assert np.abs(seen - plain).max() > 8
    assert main(["generate", "a cat", "-o", "plain.png", *few]) == 0
    assert "loras" not in json.loads(Image.open("plain.png").text["wuerstchen"]) and np.array_equal(
        np.array(Image.open("plain.png")), plain
    )


@pytest.mark.parametrize("given", ["none.safetensors", "none.safetensors:0.5", "style.safetensors:strong"])
def test_a_lora_that_is_not_there_is_named(tiny_folder, style, capsys, given):
    assert main(["generate", "a cat", "--lora", given, "--model", str(tiny_folder)]) == 2
    name = given.removesuffix(":0.5")
    assert capsys.readouterr().err.splitlines()[-1] == f"wuerstchen: {name}: there is no such file"


def test_inspect_tells_what_a_lora_is(style, theirs, config, tmp_path, capsys):
    assert main(["inspect", "style.safetensors"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("style.safetensors: safetensors, 0.0 MB")
    assert told[1:] == [
        "lora: load_lora takes it",
        "  for a Stage C  of width 32",
        "  modules        8: attention.to_k, attention.to_out.0, attention.to_q, attention.to_v",
        "  rank           2",
        "  alpha          3",
        "  parameters     1,024",
        "  dtype          float32",
    ]
    theirs.add_adapter(config(EVERYTHING, rank_pattern={"mapper": 3}))
    told = list(describe(adapter(theirs, tmp_path / "all")))
    assert told[2:5:2] == ["  for a Stage C  of width 32", "  rank           3, 4"]
