"""Whole sets in one file, and weights in float8, in the real host."""

import pytest
import torch

import wuerstchen_core as w
from tests.comfyui.host import noise
from tests.reference import distance
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


def test_float8_is_only_how_weights_are_stored(run, load):
    """All compute as the host decides, from the values that the core reads."""
    given = load("small")
    for one in weights(given):
        assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in one.values())
    text = run("WuerstchenTextEncode", clip=given[1], text="pizza, noto style")[0][0]
    exact = w.load_text_encoder(MINI / SET["text_encoder_c"])(["pizza, noto style"])
    assert 0 < distance(text.float(), exact) < 0.3
    latent = noise(1, 16, 6, 6)
    assert given[5].decode(latent).isfinite().all()
