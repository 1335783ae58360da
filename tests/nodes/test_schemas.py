"""What the nodes declare."""

import ast
import copy
import dataclasses
import json

import pytest

from tests.nodes.inputs import LARGEST_SEED, ROOT
from tests.nodes.record import RECORD, breaks, described


def test_the_pack_has_its_nodes(nodes):
    assert set(nodes) == {
        "WuerstchenLoadModel",
        "WuerstchenLoadStageA",
        "WuerstchenLoadStageB",
        "WuerstchenLoadStageC",
        "WuerstchenLoadTextEncoder",
        "WuerstchenLoadSemanticCompressor",
        "WuerstchenLoadLoRA",
        "WuerstchenTextEncode",
        "WuerstchenEmptyLatent",
        "WuerstchenStageCSampler",
        "WuerstchenStageBConditioning",
        "WuerstchenStageBSampler",
        "WuerstchenScheduler",
        "WuerstchenVQGANDecode",
        "WuerstchenVQGANEncode",
        "WuerstchenSemanticCompress",
        "WuerstchenSemanticPreview",
    }


def test_every_node_and_input_is_described(nodes):
    for node in nodes.values():
        schema = node.define_schema()
        assert schema.display_name.startswith("Würstchen ")
        assert schema.category == "Würstchen"
        assert schema.description
        for socket in (*schema.inputs, *schema.outputs):
            assert socket.tooltip, f"{schema.node_id}: {socket.id}"


def test_numbers_have_defaults_within_their_limits(nodes):
    numbers = [
        given
        for node in nodes.values()
        for given in node.define_schema().inputs
        if given.get_io_type() in ("INT", "FLOAT")
    ]
    assert numbers
    for given in numbers:
        assert given.min <= given.default <= given.max


def test_seeds_have_control_after_generate_and_all_of_64_bits(nodes):
    for node_id in ("WuerstchenStageCSampler", "WuerstchenStageBSampler"):
        seed = next(given for given in nodes[node_id].define_schema().inputs if given.id == "seed")
        assert seed.control_after_generate and seed.max == LARGEST_SEED


SAMPLING = "seed steps cfg sampler"
SIGNATURES = {  # inputs, then the types of the outputs, in order
    "WuerstchenLoadModel": ("model weight_dtype", "MODEL CLIP MODEL CLIP VAE VAE"),
    "WuerstchenLoadStageC": ("file weight_dtype", "MODEL"),
    "WuerstchenLoadStageB": ("file weight_dtype", "MODEL"),
    "WuerstchenLoadTextEncoder": ("file", "CLIP"),
    "WuerstchenLoadStageA": ("file", "VAE"),
    "WuerstchenLoadSemanticCompressor": ("file previewer?", "VAE"),
    "WuerstchenLoadLoRA": ("model file strength", "MODEL"),
    "WuerstchenTextEncode": ("clip text", "CONDITIONING"),
    "WuerstchenEmptyLatent": ("width height batch_size model?", "LATENT"),
    "WuerstchenSemanticCompress": ("vae image width height", "LATENT"),
    "WuerstchenStageCSampler": (
        f"model positive negative latent {SAMPLING} schedule denoise cfg_interval_low? cfg_interval_high? cfg_rescale? "
        "preview?",
        "LATENT",
    ),
    "WuerstchenSemanticPreview": ("latent vae?", "IMAGE"),
    "WuerstchenStageBConditioning": ("latent positive? negative?", "CONDITIONING CONDITIONING LATENT"),
    "WuerstchenStageBSampler": (f"model latent {SAMPLING} positive? negative? schedule? preview?", "LATENT"),
    "WuerstchenVQGANDecode": ("vae latent", "IMAGE"),
    "WuerstchenVQGANEncode": ("vae image", "LATENT"),
    "WuerstchenScheduler": ("model schedule steps denoise", "SIGMAS"),
}
NETWORKS = {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}


def test_every_node_has_its_inputs_and_outputs_in_order(nodes):
    """All of ComfyUI's own types; a workflow keeps widgets and links by their places."""
    found = {}
    for node_id, node in nodes.items():
        schema = node.define_schema()
        inputs = " ".join(given.id + "?" * bool(given.optional) for given in schema.inputs)
        found[node_id] = (inputs, " ".join(output.get_io_type() for output in schema.outputs))
        for given in schema.inputs:
            assert (
                given.get_io_type() == NETWORKS.get(given.id, given.get_io_type()) or node_id == "WuerstchenLoadModel"
            )
            assert not given.get_io_type().startswith("WUERSTCHEN")
    assert found == SIGNATURES


def test_the_schemas_are_those_recorded(nodes):
    """The record also tells `generate` how to write graphs."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(described(nodes)))
    broken = breaks(recorded, now)
    assert not broken, "graphs that users have saved would break:\n" + "\n".join(broken)
    assert now == recorded, "nothing breaks, but it is not recorded: run `python -m tests.nodes.record`"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda node: node["inputs"].pop(), "nothing is where preview was"),
        (lambda node: node["inputs"].reverse(), "preview is where model was"),
        (lambda node: node["inputs"].insert(4, {**node["inputs"][-1], "id": "new"}), "new is where seed was"),
        (lambda node: node["inputs"].append({"id": "new", "type": "INT", "optional": False}), "must be optional"),
        (lambda node: node["inputs"][0].update(type="CLIP"), "model is where model was"),
        (lambda node: node["inputs"][-1].update(optional=False), "preview was optional"),
        (lambda node: node["inputs"][7]["options"].remove("ddim"), "sampler has lost an option"),
        (lambda node: node["inputs"][6].update(max=5.0), "cfg takes fewer values"),
        (lambda node: node["outputs"].clear(), "outputs keep their places"),
    ],
)
def test_what_breaks_saved_graphs_is_seen(change, says):
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    now = copy.deepcopy(recorded)
    change(now["WuerstchenStageCSampler"])
    found = breaks(recorded, now)
    assert found and says in found[0] and found[0].startswith("WuerstchenStageCSampler")
    del now["WuerstchenLoadLoRA"]
    assert any("WuerstchenLoadLoRA is gone" in each for each in breaks(recorded, now))


def test_an_optional_input_at_the_end_or_one_more_option_breaks_nothing():
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    now = copy.deepcopy(recorded)
    inputs = now["WuerstchenStageCSampler"]["inputs"]
    inputs[7]["options"].append("another")
    inputs.append({"id": "new", "type": "INT", "optional": True})
    assert breaks(recorded, now) == []


def test_nodes_are_found_by_other_words_where_the_host_knows_of_them(module, monkeypatch):
    schema, io = module("nodes.sockets").schema, module("nodes.sockets").io

    @dataclasses.dataclass
    class Older:
        node_id: str
        category: str

    @dataclasses.dataclass
    class Newer(Older):
        search_aliases: list

    monkeypatch.setattr(io, "Schema", Older)
    assert schema("ksampler, img2img", node_id="X") == Older("X", "Würstchen")
    monkeypatch.setattr(io, "Schema", Newer)
    words = ["wuerstchen", "wurstchen", "ksampler", "img2img"]
    assert schema("ksampler, img2img", node_id="X") == Newer("X", "Würstchen", words)


def test_ids_are_unique_within_a_node(nodes):
    """ComfyUI refuses the whole pack for one that is not."""
    for node in nodes.values():
        schema = node.define_schema()
        ids = [socket.id for socket in (*schema.inputs, *schema.outputs) if socket.id]
        assert len(ids) == len(set(ids)), schema.node_id


def test_only_host_imports_comfyui_and_the_pack_imports_itself_relatively():
    for path in (ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py")):
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.Import):
                modules = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
                modules = [statement.module]
            else:
                continue
            packages = {module.split(".")[0] for module in modules}
            assert not packages & {"nodes", "wuerstchen_core"}, path
            assert path.parent.name == "host" or not packages & {"comfy", "folder_paths"}, path
