"""Other layouts' tensors as ours: the command that writes them, and tensors that are missing, misshapen or too many."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wuerstchen_core as w
from tests.checkpoints.published import LOADERS, cast, clip_of_comfyui, decoder, prior, small_compressor, vqgan, write
from wuerstchen_core.checkpoints.archive import Archive
from wuerstchen_core.checkpoints.load import _part, empty, shapes
from wuerstchen_core.checkpoints.mapping import sources
from wuerstchen_core.cli import main


@torch.no_grad()
def test_every_layout_is_converted_to_ours(layout, tmp_path, capsys):
    kind, theirs, wrap = layout
    path = write(cast(wrap(theirs.state_dict()), torch.bfloat16), tmp_path / "weights.safetensors")
    out = tmp_path / "ours.safetensors"
    assert main(["convert", str(path), "-o", str(out), "--part", kind]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    converted, direct = LOADERS[kind](out, dtype=None), LOADERS[kind](path, dtype=None)
    assert converted.config == direct.config
    weights = converted.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in direct.state_dict().items())
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.bfloat16}
    del weights, converted, direct
    assert main(["convert", str(out), "-o", str(out), "--dtype", "float16"]) == 0
    assert {value.dtype for value in load_file(out).values() if value.is_floating_point()} == {torch.float16}


@pytest.fixture(scope="module")
def whole_stage_b(tmp_path_factory):
    path = tmp_path_factory.mktemp("b") / "model_v2_stage_b.pt"
    torch.save({"state_dict": decoder(True).state_dict(), "effnet_state_dict": small_compressor()}, path)
    return path


def test_stage_b_is_converted_with_its_compressor(whole_stage_b, tmp_path, capsys):
    assert main(["convert", str(whole_stage_b), "-o", str(tmp_path / "b.safetensors")]) == 2
    assert "semantic_compressor and stage_b: name one with --part" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["convert", str(whole_stage_b), "-o", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"stage_b.safetensors", "semantic_compressor.safetensors"}
    w.load_semantic_compressor(tmp_path / "semantic_compressor.safetensors")
    assert main(["convert", str(whole_stage_b), "-o", str(tmp_path), "--part", "stage_c"]) == 2
    assert "no stage_c in it" in capsys.readouterr().err


def test_what_cannot_be_written_is_named(whole_stage_b, tmp_path, capsys):
    for out in (tmp_path / "nowhere" / "b.safetensors", tmp_path / "b.pt"):
        assert main(["convert", str(whole_stage_b), "-o", str(out), "--part", "stage_b"]) == 2
        assert str(out) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


DAMAGED = {
    "stage_a": lambda: vqgan().state_dict(),
    "stage_b": lambda: decoder(published=True).state_dict(),
    "stage_c": lambda: prior(published=True).state_dict(),
    "semantic_compressor": small_compressor,
    "text_encoder": lambda: clip_of_comfyui().state_dict(),
}


def read(kind, weights):
    archive = Archive(Path("damaged.pt"), "PyTorch", weights)
    part = _part(archive, kind)
    return sources(archive, part, shapes(empty(archive, part)))


@pytest.mark.parametrize("kind", DAMAGED)
def test_no_tensor_may_be_missing_or_misshapen(kind):
    weights = DAMAGED[kind]()
    read(kind, weights)
    names = [name for name in weights if not re.search("tracked$|text_projection", name)]
    for i, name in enumerate(names[:: {"stage_a": 1, "stage_c": 1}.get(kind, 5)]):
        tensor = weights[name]
        wrong = [torch.empty(3), tensor[None], torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 1)]
        # The text's width is that of these tensors, and of no other.
        wrong = wrong[:2] if name in ("clip_mapper.weight", "cond_mapper.0.weight") else wrong
        for other in (None, wrong[i % len(wrong)]):
            damaged = {key: value for key, value in weights.items() if key != name}
            if other is not None:
                damaged[name] = other
            with pytest.raises(w.WuerstchenError, match=f"damaged.pt: .*{kind}"):
                read(kind, damaged)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_tensor_too_many_within_the_network_is_named(kind):
    weights = DAMAGED[kind]()
    read(kind, weights | {"logit_scale": torch.ones(())})
    name = {
        "stage_a": "down_blocks.0.more.weight",
        "stage_b": "down_blocks.1.1.more.weight",
        "stage_c": "blocks.0.more.weight",
        "semantic_compressor": "backbone.1.0.more.weight",
        "text_encoder": "text_model.encoder.layers.1.self_attn.q_norm.weight",
    }[kind]
    with pytest.raises(w.WuerstchenError, match=re.escape(name)):
        read(kind, weights | {name: torch.ones(2)})
