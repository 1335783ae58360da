"""What the nodes declare."""

import ast

from tests.nodes.inputs import LARGEST_SEED, ROOT


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
    "WuerstchenEmptyLatent": ("width height batch_size", "LATENT"),
    "WuerstchenSemanticCompress": ("vae image width height", "LATENT"),
    "WuerstchenStageCSampler": (
        f"model positive negative latent {SAMPLING} schedule denoise cfg_interval_low? cfg_interval_high? cfg_rescale?",
        "LATENT",
    ),
    "WuerstchenSemanticPreview": ("latent vae?", "IMAGE"),
    "WuerstchenStageBConditioning": ("latent positive? negative?", "CONDITIONING CONDITIONING LATENT"),
    "WuerstchenStageBSampler": (f"model latent {SAMPLING} positive? negative? schedule?", "LATENT"),
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
