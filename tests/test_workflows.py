"""The graphs in workflows/: both formats against the nodes' schemas, and every graph executed to a picture."""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import wuerstchen_core as w
from tests.reference import fill_zeros
from wuerstchen_core.checkpoints.sets import MINI, SET
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig

FOLDER = Path(__file__).parents[1] / "workflows"
RELEASED = "text_to_image_v2"  # it takes the released weights, the others the mini
NAMES = ("text_to_image", "image_to_image", "image_variation", "mix_two_pictures", RELEASED)
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
    for model in wanted(read(RELEASED)):
        (models / model["directory"] / model["name"]).symlink_to(small_files[model["name"]])
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


def test_the_folder_holds_the_graphs_in_both_formats_and_the_minis_with_thumbnails():
    """A thumbnail is a picture that its graph drew; the released weights have not drawn one here."""
    files = {f"{name}.json" for name in NAMES} | {f"{name}.jpg" for name in NAMES if name != RELEASED}
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
            assert isinstance(value, {"INT": int, "FLOAT": (int, float)}.get(widget.type, str))
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


def test_every_file_of_the_released_graph_can_be_offered(catalogue):
    """By what ComfyUI's page asks of it: from an allowed host, of an allowed suffix, the one that its node has picked.

    That it is listed by the node once it lies in its directory, the combos of the schemas above show.
    """
    graph, files = read(RELEASED), set()
    for node in graph["nodes"]:
        if not node["type"].startswith("WuerstchenLoad"):
            assert not node.get("properties", {}).get("models")
            continue
        (model,) = node["properties"]["models"]
        assert model.keys() == {"name", "url", "directory"}
        assert node["widgets_values"] == [model["name"]] and model["name"].endswith(".safetensors")
        assert "/" not in model["name"]
        assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+\.safetensors", model["url"])
        files.add(model["name"])
    assert len(files) == 5  # two of one name would be one file


def test_the_note_names_every_file_its_folder_and_its_source():
    graph = read(RELEASED)
    (note,) = (node["widgets_values"][0] for node in graph["nodes"] if node["type"] == NOTE)
    for model in wanted(graph):
        repository, path = re.fullmatch(
            r"(https://huggingface\.co/[^/]+/[^/]+)/resolve/main/(.+)", model["url"]
        ).groups()
        (line,) = (line for line in note.splitlines() if f"`{model['directory']}/{model['name']}`" in line)
        assert f"({repository})" in line and f"`{path}`" in line


# Execution


@pytest.fixture
def execute(run):
    """API graph -> the pictures that it saves."""
    example = torch.rand(1, 300, 500, 3, generator=torch.Generator().manual_seed(0))
    kinds = {
        "LoadImage": lambda image: (example, torch.zeros(1, 64, 64)),
        "PreviewImage": lambda images: (),
        "SaveImage": lambda images, filename_prefix: images,
        "LatentBlend": lambda samples1, samples2, blend_factor: {
            **samples1,
            "samples": samples1["samples"] * blend_factor + samples2["samples"] * (1 - blend_factor),
        },
        "PrimitiveStringMultiline": lambda value: value,
        "WuerstchenLoadModel": functools.cache(lambda model: run("WuerstchenLoadModel", model=model)),
    }

    def execute(graph):
        results = {}

        def result(node_id):
            if node_id not in results:
                node = graph[node_id]
                inputs = {
                    name: value if not isinstance(value, list) else result(value[0])[value[1]]
                    for name, value in node["inputs"].items()
                }
                kind = node["class_type"]
                given = kinds[kind](**inputs) if kind in kinds else run(kind, **inputs)
                results[node_id] = given if isinstance(given, tuple) else (given,)
            return results[node_id]

        saves = [node_id for node_id, node in graph.items() if node["class_type"] == "SaveImage"]
        assert len(saves) == 1
        return result(saves[0])[0]

    return execute


@pytest.fixture
def tiny_as_mini(module, tiny_folder, monkeypatch):
    monkeypatch.setattr(module("nodes.host.folders"), "MINI", tiny_folder)


def smaller(graph, steps, size=256):
    """The graph with few steps, and a small picture."""
    values = {"steps": steps, "width": size, "height": size}
    return {
        node_id: {**node, "inputs": {given: values.get(given, value) for given, value in node["inputs"].items()}}
        for node_id, node in graph.items()
    }


def test_every_graph_makes_a_picture(name, execute, tiny_as_mini, released):
    graph = read(name, FOLDER / "api")
    ((width, height),) = {
        (node["inputs"]["width"], node["inputs"]["height"]) for node in graph.values() if "width" in node["inputs"]
    }
    assert (width, height) == ((1024, 1024) if name == RELEASED else (256, 256))
    image = execute(graph)
    assert image.shape == (1, height, width, 3)
    assert image.isfinite().all() and image.std() > 0


def test_every_setting_of_a_graph_matters(name, execute, tiny_as_mini, released):
    """A seed that nothing depends on, or a prompt that reaches no sampler, is a graph wired wrongly."""
    graph = smaller(read(name, FOLDER / "api"), 2)
    image = execute(graph)
    others = {"seed": 77, "text": "a dog", "value": "a dog", "blend_factor": 0.9, "denoise": 0.3}
    for node_id, node in graph.items():
        for given in others.keys() & node["inputs"].keys():
            if not isinstance(node["inputs"][given], list):
                changed = {**graph, node_id: {**node, "inputs": {**node["inputs"], given: others[given]}}}
                assert not torch.allclose(execute(changed), image), f"{node['_meta']['title']}: {given}"


def asked(graph):
    """The settings of a graph with one prompt and one seed, as `generate` takes them."""
    (prompt,) = (node["inputs"]["value"] for node in graph.values() if node["class_type"] == "PrimitiveStringMultiline")
    (seed,) = {node["inputs"]["seed"] for node in graph.values() if "seed" in node["inputs"]}
    (cfg,) = (node["inputs"]["cfg"] for node in graph.values() if node["class_type"] == "WuerstchenStageCSampler")
    return {"prompt": prompt, "seed": seed, "cfg_c": cfg}


def test_text_to_image_is_what_the_core_generates(execute, tiny_as_mini, tiny):
    graph = read("text_to_image", FOLDER / "api")
    torch.testing.assert_close(execute(graph), tiny.generate(**asked(graph)), rtol=1e-4, atol=1e-4)


def test_the_mini_makes_a_picture_of_the_first_graph(execute):
    graph = smaller(read("text_to_image", FOLDER / "api"), 2)
    expected = w.Wuerstchen.mini().generate(**asked(graph), steps_c=2, steps_b=2)
    torch.testing.assert_close(execute(graph), expected, rtol=1e-3, atol=1e-3)


def test_the_released_graph_is_what_the_core_generates(execute, released):
    graph = smaller(read(RELEASED, FOLDER / "api"), 5)
    paths = {
        "stage_a": "wuerstchen_stage_a.safetensors",
        "stage_b": "wuerstchen_v2_stage_b.safetensors",
        "stage_c": "wuerstchen_v2_stage_c.safetensors",
        "text_encoder_c": "clip_g.safetensors",
        "text_encoder_b": "wuerstchen_clip_h.safetensors",
    }
    networks = {role: released[name] for role, name in paths.items()}
    (prompt,) = (node["inputs"]["value"] for node in graph.values() if node["class_type"] == "PrimitiveStringMultiline")
    pipe = w.Wuerstchen.from_files(**networks, semantic_compressor=MINI / SET["semantic_compressor"])
    expected = pipe.generate(prompt, seed=1, steps_c=5, steps_b=5, cfg_c=4.0, schedule="uneven")
    torch.testing.assert_close(execute(graph), expected, rtol=1e-4, atol=1e-4)


def test_the_released_graph_samples_as_the_authors_do():
    """Stage C at the 29 steps between the 30 released times with guidance 4, Stage B in 12 without."""
    settings = {node["class_type"]: node["inputs"] for node in read(RELEASED, FOLDER / "api").values()}
    stage_c, stage_b = settings["WuerstchenStageCSampler"], settings["WuerstchenStageBSampler"]
    assert [stage_c[given] for given in ("steps", "cfg", "sampler", "schedule", "denoise")] == [
        29,
        4,
        "ddpm",
        "uneven",
        1,
    ]
    assert [stage_b[given] for given in ("steps", "cfg", "sampler")] == [12, 1, "ddpm"]
