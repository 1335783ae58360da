"""The graphs in workflows/: both formats against the nodes' schemas. `comfyui/test_graphs.py` executes them."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import wuerstchen_core as w
from tests.reference import fill_zeros
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig

FOLDER = Path(__file__).parents[1] / "workflows"
RELEASED = ("text_to_image_v2", "image_to_image_v2")  # they take the released weights, the others the mini
NAMES = (
    "text_to_image", "image_to_image", "image_variation", "mix_two_pictures", "text_to_image_ksampler", "inpainting",
    "outpainting", "two_areas", "lora", "draft_and_finish", "upscale_2x", *RELEASED,
)  # fmt: skip
WITHOUT_STAGE_C = ("image_variation", "upscale_2x")
NOT_OFFERED = "model_v2_stage_b.pt"  # the page offers no .pt
WIDGETS = ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")
NOTE = "MarkdownNote"


class Input(NamedTuple):
    name: str
    type: str
    optional: bool = False
    options: tuple = ()
    least: float = float("-inf")
    most: float = float("inf")
    extra: str = ""  # a widget of the page's own that follows: its value


class Node(NamedTuple):
    title: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]  # name, type


# Of ComfyUI's own nodes, those that the graphs use.
COMFYUI = {
    "LoadImage": Node(
        "Load Image", (Input("image", "COMBO", options=("example.png",), extra="image"),),
        (("IMAGE", "IMAGE"), ("MASK", "MASK")),
    ),
    "SaveImage": Node("Save Image", (Input("images", "IMAGE"), Input("filename_prefix", "STRING")), ()),
    "PreviewImage": Node("Preview Image", (Input("images", "IMAGE"),), ()),
    "LatentBlend": Node(
        "Latent Blend",
        (Input("samples1", "LATENT"), Input("samples2", "LATENT"), Input("blend_factor", "FLOAT", least=0, most=1)),
        (("LATENT", "LATENT"),),
    ),
    "CLIPTextEncode": Node(
        "CLIP Text Encode (Prompt)",
        (Input("clip", "CLIP"), Input("text", "STRING")),
        (("CONDITIONING", "CONDITIONING"),),
    ),
    "KSampler": Node(
        "KSampler",
        (
            Input("model", "MODEL"),
            Input("seed", "INT", least=0, extra="randomize or fixed"),
            Input("steps", "INT", least=1),
            Input("cfg", "FLOAT", least=0),
            Input("sampler_name", "COMBO", options=("ddpm", "dpmpp_2m_sde")),
            Input("scheduler", "COMBO", options=("simple",)),
            Input("positive", "CONDITIONING"),
            Input("negative", "CONDITIONING"),
            Input("latent_image", "LATENT"),
            Input("denoise", "FLOAT", least=0, most=1),
        ),
        (("LATENT", "LATENT"),),
    ),
    "VAEDecode": Node("VAE Decode", (Input("samples", "LATENT"), Input("vae", "VAE")), (("IMAGE", "IMAGE"),)),
    "SetLatentNoiseMask": Node(
        "Set Latent Noise Mask", (Input("samples", "LATENT"), Input("mask", "MASK")), (("LATENT", "LATENT"),)
    ),
    "ImageCompositeMasked": Node(
        "ImageCompositeMasked",
        (
            Input("destination", "IMAGE"),
            Input("source", "IMAGE"),
            Input("x", "INT", least=0),
            Input("y", "INT", least=0),
            Input("resize_source", "BOOLEAN"),
            Input("mask", "MASK", optional=True),
        ),
        (("IMAGE", "IMAGE"),),
    ),
    "ImagePadForOutpaint": Node(
        "Pad Image for Outpainting",
        (
            Input("image", "IMAGE"),
            *(Input(side, "INT", least=0) for side in ("left", "top", "right", "bottom")),
            Input("feathering", "INT", least=0),
        ),
        (("IMAGE", "IMAGE"), ("MASK", "MASK")),
    ),
    "ImageScale": Node(
        "Upscale Image",
        (
            Input("image", "IMAGE"),
            Input("upscale_method", "COMBO", options=("bicubic", "lanczos")),
            Input("width", "INT", least=0),
            Input("height", "INT", least=0),
            Input("crop", "COMBO", options=("disabled", "center")),
        ),
        (("IMAGE", "IMAGE"),),
    ),
    "ConditioningSetAreaPercentage": Node(
        "Conditioning (Set Area with Percentage)",
        (
            Input("conditioning", "CONDITIONING"),
            *(Input(name, "FLOAT", least=0, most=1) for name in ("width", "height", "x", "y")),
            Input("strength", "FLOAT", least=0),
        ),
        (("CONDITIONING", "CONDITIONING"),),
    ),
    "ConditioningCombine": Node(
        "Conditioning (Combine)",
        (Input("conditioning_1", "CONDITIONING"), Input("conditioning_2", "CONDITIONING")),
        (("CONDITIONING", "CONDITIONING"),),
    ),
    "LatentFromBatch": Node(
        "Latent From Batch",
        (
            Input("samples", "LATENT"),
            Input("batch_index", "INT", least=0, most=63),
            Input("length", "INT", least=1, most=64),
        ),
        (("LATENT", "LATENT"),),
    ),
    "PrimitiveStringMultiline": Node("String (Multiline)", (Input("value", "STRING"),), (("STRING", "STRING"),)),
}  # fmt: skip


@pytest.fixture(scope="module")
def small_files(tiny_folder, tmp_path_factory):
    """The released files' names -> small random networks, the two text encoders of different widths, as they are."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(1)
    stage_c = Prior(StageCConfig(width=32, depth=2, heads=2, text_width=48))
    stage_c.out[1].weight.data.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
    w.save(fill_zeros(stage_c), folder / "stage_c.safetensors")
    bigg = TextEncoder(TextEncoderConfig(width=48, layers=1, heads=2))
    w.save(fill_zeros(bigg), folder / "bigg.safetensors")
    return {
        "wuerstchen_v2_stage_c.safetensors": folder / "stage_c.safetensors",
        "clip_g.safetensors": folder / "bigg.safetensors",
        "wuerstchen_v2_stage_b.safetensors": tiny_folder / SET["stage_b"],
        "wuerstchen_clip_h.safetensors": tiny_folder / SET["text_encoder_c"],
        "wuerstchen_stage_a.safetensors": tiny_folder / SET["stage_a"],
    }


@pytest.fixture
def released(models, small_files):
    """The model folders as they are once every file that a graph asks for has been put where it says."""
    files = {(model["directory"], model["name"]) for graph in RELEASED for model in wanted(read(graph))}
    for directory, name in files:
        (models / directory / name).symlink_to(small_files[name])
    (models / "diffusion_models" / NOT_OFFERED).symlink_to(small_files["wuerstchen_v2_stage_b.safetensors"])
    (models / "loras" / "my_lora.safetensors").symlink_to(small_files["wuerstchen_stage_a.safetensors"])
    return small_files


@pytest.fixture
def catalogue(nodes, released):
    """Node type -> what the graphs may ask of it."""
    ours = {}
    for node_id, node in nodes.items():
        schema = node.define_schema()
        inputs = tuple(
            Input(
                given.id,
                given.get_io_type(),
                given.optional,
                tuple(getattr(given, "options", None) or ()),
                getattr(given, "min", float("-inf")),
                getattr(given, "max", float("inf")),
                "randomize or fixed" if getattr(given, "control_after_generate", None) else "",
            )
            for given in schema.inputs
        )
        outputs = tuple(
            (output.display_name or output.get_io_type(), output.get_io_type()) for output in schema.outputs
        )
        ours[node_id] = Node(schema.display_name, inputs, outputs)
    return COMFYUI | ours


def read(name, folder=FOLDER):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def wanted(graph):
    """What ComfyUI offers to download where it is missing."""
    return [model for node in graph["nodes"] for model in node["properties"].get("models", [])]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_the_folder_holds_the_graphs_in_both_formats_with_thumbnails():
    files = {f"{name}{suffix}" for name in NAMES for suffix in (".json", ".jpg")}
    assert {path.name for path in FOLDER.iterdir()} == files | {"api"}
    assert {path.name for path in (FOLDER / "api").iterdir()} == {f"{name}.json" for name in NAMES}


# The page's format


def test_links_join_sockets_that_exist_and_are_of_one_type(name):
    graph = read(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert len(nodes) == len(graph["nodes"]) and len(links) == len(graph["links"])
    assert graph["last_node_id"] == max(nodes) and graph["last_link_id"] == max(links)
    for link_id, source, slot, target, position, kind in graph["links"]:
        output, given = nodes[source]["outputs"][slot], nodes[target]["inputs"][position]
        assert link_id in output["links"] and given["link"] == link_id
        assert output["type"] == given["type"] == kind
    for node in nodes.values():
        for output in node["outputs"]:
            assert all(links[link][1] == node["id"] for link in output["links"])
        assert all(given["link"] in {None, *links} for given in node["inputs"])


def test_sockets_and_widgets_are_the_schemas(name, catalogue):
    for node in read(name)["nodes"]:
        if node["type"] == NOTE:
            continue
        known = catalogue[node["type"]]
        assert [(output["name"], output["type"]) for output in node["outputs"]] == list(known.outputs)
        linked = {given["name"]: given for given in node["inputs"]}
        sockets = [given for given in known.inputs if given.type not in WIDGETS or given.name in linked]
        assert [(given["name"], given["type"]) for given in node["inputs"]] == [socket[:2] for socket in sockets]
        for socket in sockets:
            assert socket.optional or linked[socket.name]["link"] is not None, f"{node['type']}: {socket.name}"
            assert ("widget" in linked[socket.name]) == (socket.type in WIDGETS)

        values = iter(node.get("widgets_values", []))
        for widget in (given for given in known.inputs if given.type in WIDGETS):
            value = next(values)
            assert isinstance(value, {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool}.get(widget.type, str))
            if widget.type == "COMBO":
                assert value in widget.options
            elif widget.type != "STRING":
                assert widget.least <= value <= widget.most
            if widget.extra:
                assert next(values) in widget.extra.split(" or ")
        assert not list(values), node["type"]


def test_the_layout_reads_from_left_to_right_in_titled_groups(name):
    graph = read(name)
    title = 30  # the height of a node's title, which lies above its position

    def box(node):
        (x, y), (width, height) = node["pos"], node["size"]
        return x, y - title, x + width, y + height

    def frame(group):
        x, y, width, height = group["bounding"]
        return x, y, x + width, y + height

    def within(inner, outer):
        return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] <= outer[2] and inner[3] <= outer[3]

    def apart(one, other):
        return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]

    home = {}
    for node in graph["nodes"]:
        if node["type"] == NOTE:
            assert "Try\n- " in node["widgets_values"][0]
        else:
            (home[node["id"]],) = [group for group in graph["groups"] if within(box(node), frame(group))]
    assert any(node["type"] == NOTE for node in graph["nodes"])
    assert all(group["title"] and any(group is other for other in home.values()) for group in graph["groups"])
    notes = [box(node) for node in graph["nodes"] if node["type"] == NOTE]
    for boxes in ([box(node) for node in graph["nodes"]], [*map(frame, graph["groups"]), *notes]):
        assert all(apart(one, other) for i, one in enumerate(boxes) for other in boxes[:i])
    positions = {node["id"]: node["pos"] for node in graph["nodes"]}
    for _, source, _, target, _, _ in graph["links"]:
        assert positions[source][0] <= positions[target][0]


def test_a_live_preview_of_stage_c_has_room_in_its_group(name):
    """ComfyUI makes the sampler 220 higher by it, at the width of 300 that ours have."""
    graph = read(name)
    samplers = [
        node for node in graph["nodes"] if node["type"] == "WuerstchenStageCSampler" or node.get("title") == "Stage C"
    ]
    assert bool(samplers) == (name not in WITHOUT_STAGE_C)
    for sampler in samplers:
        x, y = sampler["pos"]
        end = y + sampler["size"][1] + 220
        [bottom] = [
            top + height
            for left, top, width, height in (group["bounding"] for group in graph["groups"])
            if left <= x < left + width and top <= y < top + height
        ]
        below = [node["pos"][1] - 30 for node in graph["nodes"] if node["pos"][0] == x and node["pos"][1] > y]
        assert end <= min([bottom, *below])


def test_the_order_is_one_that_can_be_executed(name):
    graph = read(name)
    order = {node["id"]: node["order"] for node in graph["nodes"]}
    assert sorted(order.values()) == list(range(len(order)))
    assert all(order[link[1]] < order[link[3]] for link in graph["links"])


def test_both_formats_are_the_same_graph(name, catalogue):
    graph, converted = read(name), {}
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    for node in graph["nodes"]:
        if node["type"] == NOTE:
            continue
        known, values = catalogue[node["type"]], iter(node.get("widgets_values", []))
        inputs = {}
        for given in known.inputs:
            if given.type in WIDGETS:
                inputs[given.name] = next(values)
                if given.extra:
                    next(values)
        inputs |= {given["name"]: sources[given["link"]] for given in node["inputs"] if given["link"] is not None}
        title = node.get("title", known.title)
        converted[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    assert read(name, FOLDER / "api") == converted


# Which file goes where


@pytest.mark.parametrize("name", RELEASED)
def test_every_file_of_the_released_graphs_can_be_offered(name, catalogue):
    """By what ComfyUI's page asks of it: from an allowed host, of an allowed suffix, the one that its node has picked.

    That it is listed by the node once it lies in its directory, the combos of the schemas above show.
    """
    graph, files = read(name), set()
    for node in graph["nodes"]:
        if not node["type"].startswith("WuerstchenLoad") or node["widgets_values"][0] == NOT_OFFERED:
            assert not node.get("properties", {}).get("models")
            continue
        (model,) = node["properties"]["models"]
        assert model.keys() == {"name", "url", "directory"}
        assert node["widgets_values"][0] == model["name"] and model["name"].endswith(".safetensors")
        assert "/" not in model["name"]
        assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+\.safetensors", model["url"])
        files.add(model["name"])
    assert len(files) == 4  # two of one name would be one file


@pytest.mark.parametrize("name", RELEASED)
def test_the_note_names_every_file_its_folder_and_its_source(name):
    graph = read(name)
    (note,) = (node["widgets_values"][0] for node in graph["nodes"] if node["type"] == NOTE)
    for model in wanted(graph):
        repository, path = re.fullmatch(
            r"(https://huggingface\.co/[^/]+/[^/]+)/resolve/main/(.+)", model["url"]
        ).groups()
        (line,) = (line for line in note.splitlines() if f"`{model['directory']}/{model['name']}`" in line)
        assert f"({repository})" in line and f"`{path}`" in line
    needs_pt = any(NOT_OFFERED in node.get("widgets_values", []) for node in graph["nodes"])
    assert (f"- `diffusion_models/{NOT_OFFERED}`: [dome272/wuerstchen]" in note) == needs_pt


def test_a_drawn_thumbnail_is_said_to_be_a_drawing():
    """The released weights have drawn nothing here."""
    for name in NAMES:
        (note,) = (node["widgets_values"][0] for node in read(name)["nodes"] if node["type"] == NOTE)
        assert ("The thumbnail is a drawing" in note) == (name in RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_graphs_sample_as_the_authors_do(name):
    """Stage C at the 29 steps between the 30 released times with guidance 4, Stage B in 12 without."""
    settings = {node["class_type"]: node["inputs"] for node in read(name, FOLDER / "api").values()}
    stage_c, stage_b = settings["WuerstchenStageCSampler"], settings["WuerstchenStageBSampler"]
    assert [stage_c[given] for given in ("steps", "cfg", "sampler", "schedule")] == [29, 4, "ddpm", "uneven"]
    assert (stage_c["denoise"] == 1) == (name == "text_to_image_v2")
    assert [stage_b[given] for given in ("steps", "cfg", "sampler", "schedule")] == [12, 1, "ddpm", "even"]
