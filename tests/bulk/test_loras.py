"""LoRAs of single lines."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wuerstchen_core as w
from tests.loras import config, stage_c, style  # noqa: F401, fixtures
from wuerstchen_core.cli import main
from wuerstchen_core.training.stages.lora import add_lora, save_lora


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_line_is_drawn_with_its_own(tiny_folder, style, capsys):  # noqa: F811
    """Those without one, or with one that cannot be had, change no other."""
    rows = [{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1, "lora": "style.safetensors:0.7"}]
    rows += [{"prompt": "a", "seed": 1, "lora": "missing.safetensors"}, rows[0]]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = ["--model", str(tiny_folder), "--steps-c", "2", "--steps-b", "2"]
    assert main(["generate", *model, "--prompts", "p.jsonl", "--out", "out"]) == 2
    (error,) = map(json.loads, Path("out/errors.jsonl").read_text().splitlines())
    assert error["index"] == 2 and "missing.safetensors" in error["error"]
    pictures = {path.stem: np.array(Image.open(path)).astype(int) for path in Path("out").glob("*.png")}
    assert sorted(pictures) == ["000000", "000001", "000003"]
    assert np.abs(pictures["000000"] - pictures["000003"]).max() <= 1
    for name, more in {"000000": [], "000001": ["--lora", "style.safetensors:0.7"]}.items():
        assert main(["generate", "a", "--seed", "1", *model, *more, "-o", "alone.png"]) == 0
        assert np.abs(np.array(Image.open("alone.png")).astype(int) - pictures[name]).max() <= 1
    assert np.abs(pictures["000000"] - pictures["000001"]).max() > 1


def test_each_stands_on_its_own_stage_in_the_graph(tiny_folder, style, capsys):  # noqa: F811
    network = w.load_stage_b(tiny_folder / "stage_b.safetensors")
    add_lora(network, 2, 2.0, None)
    save_lora(network, Path("detail.safetensors"))
    Path("p.txt").write_text("a cat\n")
    loras = ["--lora", "style.safetensors", "--lora", "detail.safetensors"]
    small = ["--steps-c", "1", "--steps-b", "1", "--width", "64", "--height", "64"]
    assert main(["generate", "--model", str(tiny_folder), *loras, *small, "--prompts", "p.txt", "--out", "out"]) == 0
    assert capsys.readouterr().out == "1 picture in out\n"
    with Image.open("out/000000.png") as picture:
        graph = json.loads(picture.text["prompt"])
    for stage, file in (("C", "style.safetensors"), ("B", "detail.safetensors")):
        (sampler,) = (one for one in graph.values() if one["class_type"] == f"WuerstchenStage{stage}Sampler")
        lora = graph[sampler["inputs"]["model"][0]]
        assert (lora["class_type"], lora["inputs"]["file"]) == ("WuerstchenLoadLoRA", file)
