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
        "WuerstchenLoadPreviewer",
        "WuerstchenLoadLoRA",
        "WuerstchenTextEncode",
        "WuerstchenEmptyLatent",
        "WuerstchenStageCSampler",
        "WuerstchenStageBSampler",
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


def test_sockets_are_comfyuis_except_for_networks(nodes):
    types = {
        socket.get_io_type()
        for node in nodes.values()
        for socket in (*node.define_schema().inputs, *node.define_schema().outputs)
    }
    ours = {name for name in types if name.startswith("WUERSTCHEN_")}
    assert types - ours == {"IMAGE", "LATENT", "CONDITIONING", "INT", "FLOAT", "STRING", "COMBO"}
    assert len(ours) == 6


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
