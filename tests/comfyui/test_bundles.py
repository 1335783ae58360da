"""Whole sets in one file, and weights in float8, in the real host."""

import pytest
import torch

import wuerstchen_core as w
from tests.comfyui.host import noise
from wuerstchen_core.checkpoints.sets import MINI, SET
from wuerstchen_core.cli import main


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The mini as it is, and in float8."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, more in (("mini", []), ("small", ["--dtype", "float8_e4m3fn"])):
        assert main(["convert", str(MINI), "--bundle", "-o", str(folder / f"{name}.safetensors"), *more]) == 0
    return folder


@pytest.fixture
def load(run, models, bundles):
    def load(name):
        (models / "wuerstchen" / f"{name}.safetensors").symlink_to(bundles / f"{name}.safetensors")
        return run("WuerstchenLoadModel", model=f"{name}.safetensors", weight_dtype="default")

    return load


def weights(given):
    stage_c, clip, stage_b, _, stage_a, semantic = given
    held = (stage_c.model.diffusion_model, clip.cond_stage_model, stage_b.model.diffusion_model,
            stage_a.first_stage_model, semantic.first_stage_model)  # fmt: skip
    return [network.state_dict() for network in held]


def test_a_bundle_loads_what_its_folder_loads(run, load):
    ours, theirs = load("mini"), run("WuerstchenLoadModel", model="mini", weight_dtype="default")
    assert ours[3] is ours[1]  # one text encoder for both stages
    for one, other in zip(weights(ours), weights(theirs), strict=True):
        assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    file = "mini.safetensors: few steps (Stage C)"
    patched = run("WuerstchenLoadLoRA", model=ours[0], file=file, strength=1.0)
    assert len(patched.patches) == len(w.load_lora(MINI / "stage_c_distilled.safetensors").changes)


def test_float8_is_only_how_weights_are_stored(load):
    """All compute as the host decides, from the values that are in the file."""
    given = load("small")
    stored = w.load_stage_c(MINI / SET["stage_c"]).state_dict()
    for one in weights(given):
        assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in one.values())
    ours = given[0].model.diffusion_model.state_dict()
    name = "blocks.0.channelwise.0.weight"
    assert torch.equal(ours[name].float(), stored[name].to(torch.float8_e4m3fn).float())
    assert torch.equal(ours["projection.weight"].float(), stored["projection.weight"])
    assert given[5].decode(noise(1, 16, 6, 6)).isfinite().all()
