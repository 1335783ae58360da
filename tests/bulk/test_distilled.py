"""generate --prompts draws each line by the networks that generate would draw it by."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wuerstchen_core as w
from tests.loras import bits, distilled_set, same_bits
from wuerstchen_core.bulk.draw import Painter
from wuerstchen_core.bulk.lines import Prompts
from wuerstchen_core.bulk.output import Errors, Folder
from wuerstchen_core.bulk.run import Run
from wuerstchen_core.checkpoints.sets import DISTILLED
from wuerstchen_core.cli import main

SIZE = ["--width", "64", "--height", "64"]
ROWS = [  # (line, the options of generate that ask for the same)
    ({}, []),
    ({"steps_c": 4}, ["--steps-c", "4"]),
    ({"distilled": True, "sampler_b": "ddim"}, ["--distilled", "--sampler-b", "ddim"]),
    ({"distilled": False}, ["--no-distilled"]),
    ({"lora": "style.safetensors"}, ["--lora", "style.safetensors"]),
    ({"negative": "dogs"}, ["--negative", "dogs"]),
    ({}, []),
]
DISTILLED_ROWS = {0, 2, 6}


@pytest.fixture
def folder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = distilled_set(tiny_folder, tmp_path / "set")
    Path("style.safetensors").write_bytes((folder / DISTILLED["stage_c"]).read_bytes())
    Path("p.jsonl").write_text("\n".join(json.dumps({"prompt": "a cat", "seed": 7, **row}) for row, _ in ROWS))
    return folder


def draw(folder, out, *more):
    return main(["generate", "--model", str(folder), *SIZE, "--prompts", "p.jsonl", "--out", out, *more])


def read(path):
    with Image.open(path) as picture:
        return np.array(picture).astype(int), json.loads(picture.text["wuerstchen"])


def test_each_line_is_drawn_as_generate_draws_it(folder):
    assert draw(folder, "out") == 0
    for i, (_, options) in enumerate(ROWS):
        assert main(["generate", "a cat", "--seed", "7", "--model", str(folder), *SIZE, *options, "-o", "one.png"]) == 0
        (picture, told), (alone, expected) = read(f"out/{i:06}.png"), read("one.png")
        assert np.abs(picture - alone).max() <= 1, i
        assert told == expected and ("distilled" in told) == (i in DISTILLED_ROWS), i
    different = {(read(f"out/{i:06}.png")[0] // 16).tobytes() for i in range(6)}
    assert len(different) == 6


def test_the_same_bytes_in_parts_and_finished_later(folder):
    """Batches of two, so that distilled lines and others follow one another."""
    assert draw(folder, "whole", "--batch", "2") == 0
    whole = {path.name: path.read_bytes() for path in Path("whole").glob("*.png")}
    assert len(whole) == len(ROWS)
    for part in ("1/2", "2/2"):
        assert draw(folder, "parts", "--batch", "2", "--shard", part) == 0
    assert {path.name: path.read_bytes() for path in Path("parts").glob("*.png")} == whole
    assert draw(folder, "latents", "--batch", "2", "--until", "stage-c") == 0
    finish = ["generate", "--model", str(folder), "--batch", "2", "--from", "latents"]
    assert main([*finish, "--out", "finished"]) == 0
    assert {path.name: path.read_bytes() for path in Path("finished").glob("*.png")} == whole


def test_the_command_line_decides_for_all_lines_that_say_nothing_else(folder, capsys):
    assert draw(folder, "out", "--no-distilled") == 0
    assert {i for i in range(len(ROWS)) if "distilled" in read(f"out/{i:06}.png")[1]} == {2}
    assert draw(folder, "latents", "--until", "stage-c") == 0
    capsys.readouterr()
    command = ["generate", "--model", str(folder), "--from", "latents", "--out", "x", "--no-distilled"]
    assert main(command) == 2 and "--distilled has been decided in the latents" in capsys.readouterr().err


def test_the_networks_stay_as_they_were(folder):
    model = w.Wuerstchen.from_folder(folder)
    before = bits(model.stage_c), bits(model.stage_b)
    output = Folder(Path("out"), latents=True)
    lines = Prompts("p.jsonl", {"width": 64, "height": 64, "seed": 0}, model.sampling)
    Run(Painter(model), lines, output, Errors(output.folder, 0, 1), lambda *_: ({}, None), lambda text: (text, 1.0))()
    assert len(list(Path("out").glob("*.safetensors"))) == len(ROWS)
    assert same_bits(model.stage_c, before[0]) and same_bits(model.stage_b, before[1])
