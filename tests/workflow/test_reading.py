"""What a picture says of how it was drawn, read back; also from files that somebody made to do harm."""

import copy
import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.workflow.test_drawing import CASES, TOLD
from wuerstchen_core import WuerstchenError
from wuerstchen_core.workflow import png
from wuerstchen_core.workflow.drawing import Circumstances, graph_of
from wuerstchen_core.workflow.reading import settings_of_graph

API = Path(__file__).parents[2] / "workflows" / "api"


def carrying(path, **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def template(name="text_to_image"):
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("no text for Stage B", "two pictures")])
def test_a_graph_of_ours_says_what_it_was_made_of(case):
    told = {**TOLD, **CASES[case][0]}
    asked = settings_of_graph(graph_of(told, Circumstances(**CASES[case][1])).api(), "p.png")
    expected = {name: value for name, value in told.items() if name != "device"}
    if "seed_b" in expected and expected["seed_b"] == expected["seed"]:
        del expected["seed_b"]
    if "image" in expected:
        expected.setdefault("denoise", 1.0)
        if expected["batch_size"] == 1:
            del expected["batch_size"]
    if expected["cfg_b"] == 1:  # nothing reads the negative there, but Stage C
        assert asked.settings["negative_prompt"] == "a dog"
    if CASES[case][1].get("one_text_encoder", True) and "text_encoder_c" in expected:
        expected["text_encoder_b"] = expected["text_encoder_c"]
    if case == "all files":
        del expected["model"]
    assert asked.settings == expected and asked.remarks == []


def test_the_templates_are_read():
    asked = settings_of_graph(template(), "p.png")
    assert asked.settings == {
        "model": "mini", "prompt": "fox in fluent style", "negative_prompt": "", "width": 256, "height": 256,
        "batch_size": 1, "seed": 1, "steps_c": 4, "cfg_c": 1.0, "sampler": "lcm", "schedule": "even",
        "steps_b": 3, "cfg_b": 1.0, "schedule_b": "even", "cfg_interval": [0.0, 1.0], "cfg_rescale": 0.0,
        "distilled": ["stage_c"],
    }  # fmt: skip
    variation = settings_of_graph(template("image_variation"), "p.png").settings
    assert variation["denoise"] == 0 and variation["image"] == "example.png"
    released = settings_of_graph(template("text_to_image_v2"), "p.png").settings
    assert released["stage_c"] == "wuerstchen_v2_stage_c.safetensors" and "model" not in released
    with pytest.raises(WuerstchenError, match="LatentBlend"):
        settings_of_graph(template("mix_two_pictures"), "p.png")


def test_ksamplers_are_read_as_far_as_the_core_has_their_samplers():
    graph = template("text_to_image_ksampler")
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"] |= {"sampler_name": "euler", "seed": 5, "steps": 9}
    asked = settings_of_graph(graph, "p.png")
    assert (asked.settings["sampler"], asked.settings["seed"], asked.settings["steps_b"]) == ("ddim", 5, 9)
    assert any("KSampler, whose last step" in remark for remark in asked.remarks)
    for change, says in (({"sampler_name": "heun"}, "drawn by heun"), ({"scheduler": "karras"}, "by karras")):
        other = copy.deepcopy(graph)
        for node in other.values():
            if node["class_type"] == "KSampler":
                node["inputs"] |= change
        with pytest.raises(WuerstchenError, match=says):
            settings_of_graph(other, "p.png")


def change(graph, kind, **inputs):
    for node in graph.values():
        if node["class_type"] == kind:
            node["inputs"] |= inputs
    return graph


@pytest.mark.parametrize(
    "kind, inputs, says",
    [
        ("WuerstchenStageCSampler", {"seed": "x"}, "seed of node '8' is 'x'"),
        ("WuerstchenStageCSampler", {"seed": True}, "seed of node '8' is"),
        ("WuerstchenStageCSampler", {"cfg": ["3", 0]}, "cfg of node '8' comes from another node"),
        ("WuerstchenStageCSampler", {"latent": ["8", 0]}, "WuerstchenStageCSampler"),
        ("WuerstchenStageCSampler", {"positive": ["99", 0]}, "no node '99'"),
        ("WuerstchenStageCSampler", {"positive": [["4"], 0]}, "no node ''"),
        ("WuerstchenStageCSampler", {"positive": ["4", "0"]}, "positive of node '8' is not linked"),
        ("WuerstchenStageCSampler", {"model": ["1", 2]}, "output 2 is not what"),
        ("WuerstchenStageCSampler", {"denoise": 0.5}, "empty latent at a denoise below 1"),
        ("WuerstchenStageBSampler", {"positive": ["5", 0]}, "another positive prompt"),
        ("SaveImage", {"images": ["8", 0]}, "which generate does not have"),
        ("WuerstchenLoadModel", {"model": 3}, "model of node '1' is 3"),
    ],
)
def test_a_graph_that_cannot_be_followed_is_one_clear_line(kind, inputs, says):
    with pytest.raises(WuerstchenError, match=says) as caught:
        settings_of_graph(change(template(), kind, **inputs), "p.png")
    assert str(caught.value).startswith("p.png: ") and "\n" not in str(caught.value)


def test_a_circle_of_nodes_ends():
    graph = template()
    graph["20"] = {"class_type": "WuerstchenLoadLoRA", "inputs": {"model": ["20", 0], "file": "a", "strength": 1.0}}
    with pytest.raises(WuerstchenError, match="round in circles"):
        settings_of_graph(change(graph, "WuerstchenStageCSampler", model=["20", 0]), "p.png")


def test_several_pictures_are_not_guessed():
    graph = template()
    graph["30"] = {**graph["8"], "inputs": {**graph["8"]["inputs"], "seed": 9}}
    graph["31"] = {**graph["9"], "inputs": {**graph["9"]["inputs"], "latent": ["30", 0]}}
    graph["32"] = {**graph["10"], "inputs": {**graph["10"]["inputs"], "latent": ["31", 0]}}
    graph["33"] = {**graph["11"], "inputs": {**graph["11"]["inputs"], "images": ["32", 0]}}
    with pytest.raises(WuerstchenError, match="several pictures"):
        settings_of_graph(graph, "p.png")


# Files


@pytest.mark.parametrize(
    "texts, says",
    [
        ({}, "nothing in it says how it was drawn .texts: none"),
        ({"parameters": "a cat, Steps: 20"}, "texts: parameters"),
        ({"prompt": "{"}, "is not JSON"),
        ({"prompt": "[]"}, "is not a JSON object"),
        ({"prompt": "{}"}, "no SaveImage"),
        ({"prompt": '{"1": 3, "2": {"class_type": "SaveImage", "inputs": 3}}'}, "no node '2'"),
        ({"prompt": '{"1": {}, "1": {}}'}, "twice"),
        ({"prompt": '{"a":' * 100_000}, "nested too deeply"),
        ({"wuerstchen": "{}"}, "has no prompt"),
        ({"wuerstchen": '{"prompt": 3}'}, "its prompt is 3, which is of the wrong type"),
        ({"wuerstchen": '{"prompt": "", "seed": 1.5}'}, "its seed is 1.5"),
        ({"wuerstchen": '{"prompt": "", "loras": [3]}'}, "its loras are not texts"),
        ({"wuerstchen": f'{{"prompt": "", "seed": {"9" * 5000}}}'}, "is not JSON"),
    ],
)
def test_a_record_that_is_none_is_one_clear_line(tmp_path, texts, says):
    with pytest.raises(WuerstchenError, match=says) as caught:
        png.read(carrying(tmp_path / "p.png", **texts))
    assert str(caught.value).startswith(str(tmp_path / "p.png"))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_a_text_that_unfolds_to_gigabytes_is_refused_before_it_does(tmp_path, kind):
    """50 MB of spaces from 50 kB; Pillow stops at one."""
    whole = carrying(tmp_path / "p.png").read_bytes()
    bomb = zlib.compress(b" " * 50_000_000, 9)
    head = b"prompt\0" + (b"\0" if kind == b"zTXt" else b"\1\0\0\0")
    (tmp_path / "p.png").write_bytes(whole[:33] + chunk(kind, head + bomb) + whole[33:])
    with pytest.raises(WuerstchenError, match="too large"):
        png.read(tmp_path / "p.png")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n" + b"\xff" * 500])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(WuerstchenError, match="p.png: "):
        png.read(tmp_path / "p.png")
    with pytest.raises(WuerstchenError, match="none.png: there is no such file"):
        png.read("none.png")
    with pytest.raises(WuerstchenError, match="not a regular file"):
        png.read(tmp_path)


def test_a_name_is_no_way_out_of_the_folder(tmp_path):
    record = {"prompt": "", "stage_c": "../../etc/c.pt", "image": "C:\\secret\\in.png [input]", "loras": ["/a/b.pt:1"]}
    asked = png.read(carrying(tmp_path / "p.png", wuerstchen=json.dumps(record)))
    assert asked.settings == {"prompt": "", "stage_c": "c.pt", "image": "in.png", "loras": ["b.pt:1"]}
