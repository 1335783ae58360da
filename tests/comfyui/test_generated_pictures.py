"""A PNG of `wuerstchen generate` carries the graph that draws it, and ComfyUI's own PNGs can be drawn by `generate`."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import wuerstchen_core as w
from tests.comfyui.host import noise
from tests.comfyui.test_graphs import execute, read  # noqa: F401, a fixture
from tests.pictures import psnr
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.cli import main
from wuerstchen_core.util.pictures import read_picture
from wuerstchen_core.workflow.graph import HOSTS
from wuerstchen_core.workflow.reading import settings_of_graph

FEW = ["--steps-c", "4", "--steps-b", "3"]


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """generate(*arguments) -> its picture, and the API graph that it carries; in the folder that Load Image reads."""
    monkeypatch.chdir(tmp_path)

    def generate(*arguments):
        assert main(["generate", *arguments, "-o", "p.png"]) == 0
        with Image.open("p.png") as opened:
            return read_picture("p.png"), json.loads(opened.text["prompt"])

    return generate


@pytest.fixture
def started_from(tmp_path):
    """A picture, transparent around its middle."""
    picture = np.zeros((90, 120, 4), dtype=np.uint8)
    picture[20:60, 30:80] = (200, 30, 60, 255)
    picture[30:40] = (20, 130, 60, 90)
    Image.fromarray(picture).save(tmp_path / "in.png")
    Image.fromarray(picture[..., :3]).save(tmp_path / "opaque.png")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--seed", "12345", "--negative", "a dog", "--cfg-c", "3.5", "--cfg-b", "2", "--seed-b", "4"],
        ["--width", "344", "--height", "200", "--sampler", "ddim", "--schedule", "uneven"],
        ["--image", "in.png"],
        ["--image", "opaque.png", "--denoise", "0.3", "--width", "264"],
        ["--image", "in.png", "--denoise", "0"],
        ["--cfg-c", "1"],
    ],
    ids=" ".join,
)
def test_the_graph_in_a_picture_draws_it(execute, generate, started_from, arguments):  # noqa: F811
    picture, graph = generate("fox (with tail:1.2) in fluent style, “red”", *FEW, *arguments)
    assert psnr(execute(graph), picture) > 50


def test_the_mini_is_drawn_by_its_distilled_network(execute, generate):  # noqa: F811
    """By default, and again from its own record and from its graph."""
    picture, graph = generate("fox in fluent style")
    loras = [node["inputs"]["file"] for node in graph.values() if node["class_type"] == "WuerstchenLoadLoRA"]
    assert loras == ["mini: few steps (Stage C)"]
    assert psnr(execute(graph), picture) > 50
    again = settings_of_graph(graph, "p.png").settings
    assert again["distilled"] == ["stage_c"] and again["sampler"] == again.get("sampler_b", "lcm") == "lcm"
    assert (again["steps_c"], again["steps_b"]) == (4, 3)
    shutil.copy("p.png", "first.png")
    assert torch.equal(generate("--from", "first.png")[0], picture)


@pytest.mark.parametrize("arguments", [["--batch", "3"], ["--batch", "2", "--image", "opaque.png"]], ids=" ".join)
def test_a_batch_is_drawn_whole(execute, generate, started_from, tmp_path, monkeypatch, arguments):  # noqa: F811
    assert main(["generate", "a cat", *FEW, *arguments, "-o", "p.png"]) == 0
    files = sorted(tmp_path.glob("p-*.png"))
    with Image.open(files[-1]) as opened:
        graph = json.loads(opened.text["prompt"])
    pictures = execute(graph)
    assert len(pictures) == len(files) == int(arguments[1])
    for file, drawn in zip(files, pictures, strict=True):
        assert psnr(read_picture(file), drawn) > 50


def test_loras_sets_and_single_files_are_named_in_the_graph(execute, generate, models, tiny_folder, tmp_path):  # noqa: F811
    """The files are put where the note says."""
    shutil.copytree(tiny_folder, models / "wuerstchen" / "own")
    shutil.copytree(tiny_folder, tmp_path / "own")
    stage_c = w.load_stage_c(tiny_folder / SET["stage_c"])
    for parameter in stage_c.parameters():
        parameter.data = parameter * 1.2
    w.save(stage_c, tmp_path / "other.safetensors")
    module, width = "prior.blocks.2.attention.to_q", stage_c.config.width
    lora = {f"{module}.lora_A.weight": noise(4, width), f"{module}.lora_B.weight": noise(width, 4)}
    save_file(lora, tmp_path / "style.safetensors")
    shutil.copy(tmp_path / "other.safetensors", models / "diffusion_models")
    shutil.copy(tmp_path / "style.safetensors", models / "loras")
    given = ["--model", "own", "--stage-c", "other.safetensors", "--lora", "style.safetensors:0.7"]
    picture, graph = generate("a cat", *FEW, *given)
    plain, _ = generate("a cat", *FEW, *given[:4])
    assert psnr(plain, picture) < 50
    assert psnr(execute(graph), picture) > 50


def test_what_comfyui_saved_is_drawn_by_generate(execute, generate, tmp_path, capsys):  # noqa: F811
    """A PNG of SaveImage, by its graph alone."""
    _, graph = generate("red apple, noto style", *FEW, "--seed", "8", "--seed-b", "9", "--width", "264")
    drawn = execute(graph)
    [saved] = (tmp_path / "out").rglob("*.png")
    with Image.open(saved) as opened:
        texts = set(opened.text)
    if "prompt" not in texts:  # the executor was not told to keep it
        info = PngInfo()
        info.add_text("prompt", json.dumps(graph))
        Image.open(saved).save(saved, pnginfo=info)
    capsys.readouterr()
    again, _ = generate("--from", str(saved))
    assert psnr(again, drawn) > 50
    command = capsys.readouterr().out.splitlines()[0]
    assert command.startswith("wuerstchen generate ") and "--seed-b 9" in command and "red apple, noto style" in command


def test_a_ksampler_graph_is_drawn_by_generate_nearly(execute, generate, tmp_path):  # noqa: F811
    graph = read("text_to_image_ksampler")
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"] |= {"sampler_name": "euler", "steps": 30, "seed": 2}
    drawn = execute(graph)
    info = PngInfo()
    info.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (8, 8)).save("k.png", pnginfo=info)
    again, _ = generate("--from", "k.png")
    other, _ = generate("--from", "k.png", "--seed", "5")
    assert psnr(again, drawn) > 25 > psnr(other, drawn)  # but for the last step: 0.9999 of the signal, not all


def test_hosts_nodes_are_as_the_graphs_take_them(host_nodes):
    primitives = importlib.import_module("comfy_extras.nodes_primitive")
    found = {**host_nodes, "PrimitiveStringMultiline": primitives.StringMultiline}
    for node_id, known in HOSTS.items():
        node = found[node_id]
        given = node.INPUT_TYPES()
        assert list(given["required"]) == [each["id"] for each in known["inputs"]]
        for each in known["inputs"]:
            kind = given["required"][each["id"]][0]
            assert ("COMBO" if isinstance(kind, list) else kind) == each["type"]
        assert [kind for _, kind in known["outputs"]] == list(node.RETURN_TYPES)
