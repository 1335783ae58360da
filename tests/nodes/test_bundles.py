"""Bundles in models/wuerstchen: listed as sets, and read again when they change."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from wuerstchen_core.checkpoints.sets import DISTILLED
from wuerstchen_core.cli import main


@pytest.fixture
def place(models, tiny_folder, tmp_path):
    """models/wuerstchen with a bundle, one in parts, one that is cut short, and a file of one network."""
    folder = models / "wuerstchen"
    whole = tmp_path / "whole"
    shutil.copytree(tiny_folder, whole)
    halves = {"lora_A": torch.randn(2, 32), "lora_B": torch.randn(32, 2)}
    tensors = {f"blocks.2.attention.to_q.{half}.weight": tensor for half, tensor in halves.items()}
    save_file(tensors, whole / DISTILLED["stage_c"], {"wuerstchen_sampling": '{"steps": 2}'})
    assert main(["convert", str(whole), "--bundle", "-o", str(folder / "one.safetensors")]) == 0
    parts = ["-o", str(folder / "parts.safetensors"), "--shard-size", "3MB"]
    assert main(["convert", str(tiny_folder), "--bundle", *parts]) == 0
    shutil.copy(tiny_folder / "stage_c.safetensors", folder)
    (folder / "cut.safetensors").write_bytes((folder / "one.safetensors").read_bytes()[:-1])
    return folder


def test_bundles_are_listed_as_sets(nodes, place):
    options = nodes["WuerstchenLoadModel"].define_schema().inputs[0].options
    assert options == ["mini", "one.safetensors", "parts.safetensors.index.json"]
    loras = nodes["WuerstchenLoadLoRA"].define_schema().inputs[1].options
    assert "one.safetensors: few steps (Stage C)" in loras
    assert nodes["WuerstchenLoadModel"].validate_inputs(model="one.safetensors") is True
    told = nodes["WuerstchenLoadModel"].validate_inputs(model="stage_c.safetensors")
    assert "no whole set of that name" in told and "one.safetensors" in told


def test_a_bundle_that_lacks_a_network_is_left_out_with_one_warning(nodes, module, place, tiny_folder, caplog):
    from wuerstchen_core.checkpoints.contents import bundle, write

    files = {name: tiny_folder / f"{name}.safetensors" for name in ("stage_a", "stage_b", "text_encoder")}
    write(bundle(files), place / "torn.safetensors")
    for _ in range(2):
        assert "torn.safetensors" not in nodes["WuerstchenLoadModel"].define_schema().inputs[0].options
    missing = (
        "torn.safetensors: not a whole set of weights, stage_c.safetensors, semantic_compressor.safetensors missing"
    )
    assert caplog.text.count(missing) == 1
    with pytest.raises(ValueError, match="torn.safetensors: not a whole set"):
        module("nodes.host.folders").model_set("torn.safetensors")


def test_a_bundle_that_is_written_anew_is_loaded_anew(nodes, place):
    loader = nodes["WuerstchenLoadModel"]
    before = loader.fingerprint_inputs("one.safetensors")
    assert before == loader.fingerprint_inputs("one.safetensors") and "missing" not in str(before)
    path = place / "one.safetensors"
    path.write_bytes(path.read_bytes())
    assert loader.fingerprint_inputs("one.safetensors") != before
    few = "one.safetensors: few steps (Stage C)"
    stamp = nodes["WuerstchenLoadLoRA"].fingerprint_inputs(few)
    assert "missing" not in str(stamp) and stamp == nodes["WuerstchenLoadLoRA"].fingerprint_inputs(few)
