"""Every graph of workflows/, executed by ComfyUI itself to a picture."""

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import wuerstchen_core as w
from tests import blueprints
from tests.pictures import psnr
from tests.reference import fill_zeros
from wuerstchen_core.checkpoints.sets import MINI, SET
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig
from wuerstchen_core.util.pictures import read_picture

FOLDER = Path(__file__).parents[2] / "workflows" / "api"
NAMES = [path.stem for path in FOLDER.glob("*.json")]
RELEASED = ("text_to_image_v2", "image_to_image_v2")
SIZES = {"inpainting": (300, 500), "two_areas": (256, 512), "upscale_2x": (512, 512)}  # the others: 256 x 256


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


class Server:
    """What ComfyUI's executor tells its page."""

    client_id = last_node_id = last_prompt_id = None

    def __init__(self):
        self.sent = []

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, data))


@pytest.fixture
def execute(nodes, host_nodes, models, tmp_path, monkeypatch):
    """API graph -> the picture or pictures of its SaveImage, as ComfyUI validates and executes it."""
    import execution
    import folder_paths

    import nodes as comfyui

    primitives = __import__("comfy_extras.nodes_primitive", fromlist=["*"])
    primitive = {"PrimitiveStringMultiline": primitives.StringMultiline}
    monkeypatch.setattr(comfyui, "NODE_CLASS_MAPPINGS", {**host_nodes, **primitive, **nodes})
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "out"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    pixels = torch.rand(300, 500, 4, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    pixels[..., 3] = 255
    pixels[100:250, 150:400, 3] = 0  # the mask, as the page's editor saves it
    Image.fromarray(pixels.numpy()).save(tmp_path / "example.png")

    def execute(graph):
        server = Server()
        valid, error, outputs, wrong = asyncio.run(execution.validate_prompt("p", graph, None))
        assert valid, (error, wrong)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        execution.PromptExecutor(server).execute(graph, "p", execute_outputs=outputs)
        errors = [data["exception_message"] for event, data in server.sent if event == "execution_error"]
        assert not errors, errors
        pictures = [read_picture(file) for file in sorted((tmp_path / "out").rglob("*.png"))]
        return pictures[0] if len(pictures) == 1 else torch.stack(pictures)

    return execute


def smaller(graph, steps, **sizes):
    """The graph with few steps."""
    values = {"steps": steps, **sizes}
    return {
        node_id: {**node, "inputs": {given: values.get(given, value) for given, value in node["inputs"].items()}}
        for node_id, node in graph.items()
    }


@pytest.fixture
def released(models, tiny_folder):
    """Small random networks under the names of the released files."""
    torch.manual_seed(1)
    stage_c = Prior(StageCConfig(width=64, depth=2, heads=1, text_width=64))
    stage_c.out[1].weight.data.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
    files = {
        "stage_c": models / "diffusion_models" / "wuerstchen_v2_stage_c.safetensors",
        "text_encoder_c": models / "text_encoders" / "clip_g.safetensors",
        "stage_b": models / "diffusion_models" / "wuerstchen_v2_stage_b.safetensors",
        "stage_a": models / "vae" / "wuerstchen_stage_a.safetensors",
    }
    w.save(fill_zeros(stage_c), files["stage_c"])
    w.save(fill_zeros(TextEncoder(TextEncoderConfig(width=64, layers=1, heads=1))), files["text_encoder_c"])
    shutil.copy(tiny_folder / SET["stage_b"], files["stage_b"])
    shutil.copy(tiny_folder / SET["stage_a"], files["stage_a"])
    compressor = load_file(tiny_folder / SET["semantic_compressor"])
    torch.save({"state_dict": {}, "effnet_state_dict": compressor}, files["stage_b"].with_name("model_v2_stage_b.pt"))
    return files


@pytest.fixture
def lora(models):
    """A random LoRA for the mini's Stage C, by the name that the graph has for the user's own."""
    width = w.load_stage_c(MINI / SET["stage_c"]).config.width
    torch.manual_seed(2)
    down, up = torch.randn(4, width), torch.randn(width, 4)
    name = "blocks.2.attention.to_q"
    weights = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(weights, models / "loras" / "my_lora.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_makes_a_picture_and_all_its_settings_matter(execute, released, lora, name):
    graph = smaller(read(name), 2, **({"width": 256, "height": 256} if name in RELEASED else {}))
    image = execute(graph)
    assert image.shape == (*SIZES.get(name, (256, 256)), 3) and image.std() > 0
    others = {"seed": 77, "text": "a dog", "value": "a dog", "blend_factor": 0.9, "denoise": 0.3, "batch_index": 5}
    guided = any(node["inputs"].get("cfg", 1) != 1 for node in graph.values())
    for node_id, node in graph.items():
        if node["_meta"]["title"] == "Negative prompt" and not guided:
            continue
        for given in others.keys() & node["inputs"].keys():
            if not isinstance(node["inputs"][given], list):
                changed = {**graph, node_id: {**node, "inputs": {**node["inputs"], given: others[given]}}}
                assert not torch.equal(execute(changed), image), f"{node['_meta']['title']}: {given}"


def asked(graph):
    """The settings of a graph with one prompt and one seed, as `generate` takes them."""
    (prompt,) = (node["inputs"]["value"] for node in graph.values() if node["class_type"] == "PrimitiveStringMultiline")
    (seed,) = {node["inputs"]["seed"] for node in graph.values() if "seed" in node["inputs"]}
    (cfg,) = (node["inputs"]["cfg"] for node in graph.values() if node["class_type"] == "WuerstchenStageCSampler")
    return {"prompt": prompt, "seed": seed, "cfg_c": cfg}


def test_the_first_graph_is_what_the_core_generates(execute):
    """By default: with the mini's distilled Stage C, and its few steps of Stage B."""
    graph = read("text_to_image")
    told = asked(graph)
    expected = w.Wuerstchen.mini().generate(told["prompt"], seed=told["seed"])[0]
    assert psnr(execute(graph), expected) > 50  # the file has 8 bits


def test_the_released_graph_is_what_the_core_generates(execute, released):
    """Without a text encoder for Stage B, as the released networks do without one."""
    graph = smaller(read(RELEASED[0]), 5, width=256, height=256)
    pipe = w.Wuerstchen.from_files(**released, semantic_compressor=MINI / SET["semantic_compressor"])
    options = {**asked(graph), "sampler": "ddpm", "schedule": "uneven", "schedule_b": "even"}
    expected = pipe.generate(**options, steps_c=5, steps_b=5)[0]
    assert psnr(execute(graph), expected) > 50


def changed(graph, title, **inputs):
    return {
        node_id: {**node, "inputs": {**node["inputs"], **inputs}} if node["_meta"]["title"] == title else node
        for node_id, node in graph.items()
    }


def source(folder):
    """The picture that LoadImage reads, its mask aside: (300, 500, 3)"""
    return torch.from_numpy(np.asarray(Image.open(folder / "example.png").convert("RGB")) / 255).float()


def test_inpainting_changes_nothing_outside_of_the_mask(execute, tmp_path):
    original = source(tmp_path)
    inside = torch.zeros(300, 500, dtype=torch.bool)
    inside[100:250, 150:400] = True
    drawn = execute(smaller(read("inpainting"), 2))
    assert torch.equal(drawn[~inside], original[~inside])
    assert (drawn - original)[inside].abs().mean() > 0.1


def test_outpainting_keeps_the_picture_up_to_its_seam(execute, tmp_path):
    whole = Image.open(tmp_path / "example.png").convert("RGB").crop((100, 0, 400, 300))
    scaled = torch.from_numpy(np.asarray(whole.resize((160, 160), Image.Resampling.LANCZOS)) / 255).float()
    drawn = execute(smaller(read("outpainting"), 2))
    kept = (drawn[56:200, 56:200] - scaled[8:-8, 8:-8]).abs()
    assert kept.max() < 1.5 / 255
    assert drawn[:40].std() > 0.01  # not the empty border


def test_a_prompt_for_one_half_changes_that_half(execute):
    graph = smaller(read("two_areas"), 2)
    difference = (execute(graph) - execute(changed(graph, "Left", text="blue heart in noto style"))).abs()
    assert difference[:, :200].mean() > 10 * difference[:, 312:].mean()


def test_a_lora_of_strength_0_changes_nothing(execute, lora, mini):
    graph = changed(smaller(read("lora"), 6), "LoRA for Stage C", strength=0.0)
    assert psnr(execute(graph), mini.generate(**asked(graph), steps_c=6, steps_b=6)[0]) > 50
    assert psnr(execute(changed(graph, "LoRA for Stage C", strength=1.0)), execute(graph)) < 40


def test_the_chosen_draft_is_that_picture_of_the_batch(execute, mini):
    graph = smaller(read("draft_and_finish"), 3)
    batch = mini.generate(**asked(graph), batch_size=8, steps_c=3, steps_b=3)
    assert psnr(execute(graph), batch[2]) > 50


def test_the_blueprints_draw_what_the_core_generates(execute, nodes, mini, tmp_path):
    known = {node_id: list(blueprints.widgets(node.define_schema())) for node_id, node in nodes.items()}
    known["PrimitiveStringMultiline"] = ["value"]
    drawn = execute(blueprints.flat(blueprints.read(blueprints.TEXT), known))
    assert psnr(drawn, mini.generate("fox in fluent style", seed=1)[0]) > 50
    loader = {"loader": {"inputs": {"image": "example.png"}, "class_type": "LoadImage", "_meta": {}}}
    graph = blueprints.flat(blueprints.read(blueprints.PICTURE), known, image=["loader", 0])
    expected = mini.generate("fox in fluent style", seed=1, image=source(tmp_path), denoise=0.6)[0]
    assert psnr(execute(graph | loader), expected) > 50
