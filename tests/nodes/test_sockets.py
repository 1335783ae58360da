"""What a script may put on a socket, and sizes out of range: one clear error."""

import pytest

from tests.nodes.inputs import QUICK_B, QUICK_C, noise, picture


@pytest.fixture
def calls(loaded, previewer, text, empty):
    """node -> (its socket of a network, the loader, all of its inputs)"""
    of_c, of_a = empty(), {"samples": noise(1, 4, 16, 16)}
    texts = {"positive": text("a cat"), "negative": text("")}
    return {
        "WuerstchenTextEncode": ("text_encoder", "Text Encoder", {"text": "a cat"}),
        "WuerstchenStageCSampler": ("stage_c", "Stage C", {"latent": of_c, **texts, **QUICK_C}),
        "WuerstchenStageBSampler": ("stage_b", "Stage B", {"latent": of_c, **QUICK_B}),
        "WuerstchenVQGANDecode": ("stage_a", "Stage A", {"latent": of_a}),
        "WuerstchenVQGANEncode": ("stage_a", "Stage A", {"image": picture(64, 64)}),
        "WuerstchenSemanticCompress": (
            "semantic_compressor",
            "Semantic Compressor",
            {"image": picture(64, 64), "width": 128, "height": 128},
        ),
        "WuerstchenSemanticPreview": ("previewer", "Previewer", {"latent": of_c}),
        "WuerstchenLoadLoRA": ("stage_c", "Stage C", {"file": "a.safetensors", "strength": 1.0}),
    }


def test_what_is_no_network_of_that_kind_is_refused(run, loaded, calls, nodes):
    named = {node.define_schema().display_name for node in nodes.values()}
    for node_id, (socket, loader, inputs) in calls.items():
        other = loaded["stage_b" if socket != "stage_b" else "stage_c"]
        for wrong, found in (("x", "str"), (0, "int"), (other, type(other.network).__name__), (other.network, None)):
            with pytest.raises(ValueError) as caught:
                run(node_id, **{socket: wrong}, **inputs)
            message = str(caught.value)
            assert message.startswith(f"{socket}: expected the output of Würstchen Load {loader} or ")
            assert message.endswith(f"got {found or type(other.network).__name__}")
            assert f"Würstchen Load {loader}" in named


def test_a_previewer_of_the_stage_c_sampler_is_looked_at_too(run, loaded, calls):
    with pytest.raises(ValueError, match="previewer: expected the output of Würstchen Load Previewer .*, got str"):
        run("WuerstchenStageCSampler", stage_c=loaded["stage_c"], previewer="x", **calls["WuerstchenStageCSampler"][2])


def test_what_is_no_latent_is_refused(run, loaded, calls):
    for node_id in ("WuerstchenStageCSampler", "WuerstchenStageBSampler", "WuerstchenVQGANDecode"):
        socket, _, inputs = calls[node_id]
        for wrong in ("x", None, {}, {"samples": "x"}, noise(1, 16, 3, 3)):
            with pytest.raises(ValueError, match="takes a latent, not .*: take it from Würstchen"):
                run(node_id, **{socket: loaded[socket]}, **{**inputs, "latent": wrong})


def test_what_is_no_text_is_refused(run, loaded):
    with pytest.raises(ValueError, match="text: expected a text, got NoneType"):
        run("WuerstchenTextEncode", text_encoder=loaded["text_encoder_c"], text=None)


@pytest.mark.parametrize("side", [120, 130, 0, -8, 4104, 8192])
@pytest.mark.parametrize("name", ["width", "height"])
def test_a_size_out_of_the_nodes_range_is_told_with_that_range(run, loaded, empty, name, side):
    sizes = {"width": 256, "height": 256, name: side}
    message = f"{name} is {side}: it must be a multiple of 8 from 128 to 4096"
    with pytest.raises(ValueError, match=message):
        empty(**sizes)
    with pytest.raises(ValueError, match=message):
        run("WuerstchenSemanticCompress", semantic_compressor=loaded["semantic_compressor"], image=picture(64, 64),
            **sizes)  # fmt: skip


def test_an_empty_batch_is_refused(empty):
    with pytest.raises(ValueError, match="batch_size is 0"):
        empty(batch_size=0)
