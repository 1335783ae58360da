"""Files of weights in every layout that the loaders take, written by the libraries that have them."""

import re

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

import wuerstchen_core as w
from tests.checkpoints.published import (
    LOADERS,
    RUNS,
    TOLERANCE,
    cast,
    clip_of_comfyui,
    clip_of_open_clip,
    decoder,
    prior,
    run_stage_a,
    run_text_encoder,
    vqgan,
    write,
)
from tests.reference import distance
from wuerstchen_core.cli import main


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@torch.no_grad()
def test_every_layout_gives_its_networks_numbers(layout, tmp_path, suffix):
    kind, theirs, wrap = layout
    path = write(wrap(theirs.state_dict()), tmp_path / f"weights{suffix}")
    ours = LOADERS[kind](path)
    assert distance(RUNS[kind](ours), RUNS[kind](theirs)) < TOLERANCE
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in ours.state_dict().values())
    assert not ours.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_layout_loads_in_half_precision(layout, tmp_path, dtype):
    kind, theirs, wrap = layout
    half = cast(theirs.state_dict(), dtype)
    path = write(wrap(half), tmp_path / "half.safetensors")
    kept = LOADERS[kind](path, dtype=dtype)
    assert {value.dtype for value in kept.state_dict().values() if value.is_floating_point()} == {dtype}
    ours = LOADERS[kind](path)
    assert {value.dtype for value in ours.state_dict().values() if value.is_floating_point()} == {torch.float32}
    original = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(cast(half, torch.float32))
    expected = RUNS[kind](theirs)
    theirs.load_state_dict(original)
    assert distance(RUNS[kind](ours), expected) < TOLERANCE


def test_every_layout_is_inspected(layout, tmp_path, capsys):
    kind, theirs, wrap = layout
    path = write(cast(wrap(theirs.state_dict()), torch.float16), tmp_path / "weights.safetensors")
    network = LOADERS[kind](path)
    assert main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert f"{kind}: load_{kind} takes it" in told and "float16" in told
    assert f"{sum(parameter.numel() for parameter in network.parameters()):,}" in told
    for field in ("width", "depth", "widths", "layers", "heads"):
        if hasattr(network.config, field):
            assert re.search(rf"  {field} +{re.escape(str(getattr(network.config, field)))}\n", told)


@pytest.mark.parametrize("asked", LOADERS)
def test_a_network_in_the_wrong_loader_is_named(layout, tmp_path, asked):
    kind, theirs, wrap = layout
    content = wrap(theirs.state_dict())
    if asked == kind or "effnet_state_dict" in content:
        return
    path = write(content, tmp_path / "weights.safetensors")
    says = f"this is a {kind} file(, with CLIP's vision tower)?; load_{kind} takes it, expected a {asked} file"
    with pytest.raises(w.WuerstchenError, match=says):
        LOADERS[asked](path)


def test_weights_in_our_names_need_no_metadata(tmp_path):
    for kind, build in {"stage_b": decoder, "stage_c": prior, "text_encoder": clip_of_open_clip}.items():
        write(build().state_dict(), tmp_path / "theirs.safetensors")
        network = LOADERS[kind](tmp_path / "theirs.safetensors")
        write(network.state_dict(), tmp_path / "bare.safetensors")
        assert distance(RUNS[kind](LOADERS[kind](tmp_path / "bare.safetensors")), RUNS[kind](network)) == 0


def test_a_folder_of_diffusers_is_its_file(tmp_path):
    (tmp_path / "prior").mkdir()
    write(prior().state_dict(), tmp_path / "prior" / "diffusion_pytorch_model.safetensors")
    assert w.load_stage_c(tmp_path / "prior").config.width == 128
    with pytest.raises(w.WuerstchenError, match="a folder"):
        w.load_stage_c(tmp_path)


def test_a_batch_norms_counter_may_be_missing(tmp_path):
    weights = {name: tensor for name, tensor in vqgan().state_dict().items() if not name.endswith("tracked")}
    network = w.load_stage_a(write(weights, tmp_path / "a.safetensors"))
    assert distance(run_stage_a(network), run_stage_a(vqgan())) < TOLERANCE
    w.save(network, tmp_path / "again.safetensors")
    w.load_stage_a(tmp_path / "again.safetensors")


@pytest.mark.parametrize("names", ["lg", "gl"])
@torch.no_grad()
def test_of_two_text_towers_the_larger_is_taken(tmp_path, names):
    """As ComfyUI saves SDXL's two."""
    large, small = clip_of_comfyui(), CLIPTextModel(CLIPTextConfig(hidden_size=64, num_hidden_layers=1))
    weights = {f"{names[0]}.{name}": tensor for name, tensor in small.state_dict().items()}
    weights |= {f"{names[1]}.{name}": tensor for name, tensor in large.state_dict().items()}
    ours = w.load_text_encoder(write(weights, tmp_path / "two.safetensors"))
    assert distance(run_text_encoder(ours), run_text_encoder(large)) < TOLERANCE
