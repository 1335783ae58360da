"""LoRAs for Stage B: their names in files, and the weights that they make."""

import pytest
import torch
from safetensors.torch import save_file

import wuerstchen_core as w
from tests.loras import pair
from wuerstchen_core.checkpoints.describe import describe
from wuerstchen_core.checkpoints.sets import SET

MODULES = ["down_blocks.1.3.attention.to_q", "up_blocks.0.0.channelwise.4", "down_blocks.1.1.semantic", "clip_mapper",
           "effnet_mappers.2", "embedding.1", "clf.1", "up_blocks.2.1.mapper"]  # fmt: skip
LAYOUTS = {
    "ours": ("decoder.{}", ".lora_A.weight", ".lora_B.weight"),
    "comfyui": ("diffusion_model.{}", ".lora_down.weight", ".lora_up.weight"),
    "kohya": ("lora_unet_{flat}", ".lora_down.weight", ".lora_up.weight"),
    "bare": ("{}", ".lora_A.weight", ".lora_B.weight"),
}


@pytest.fixture
def stage_b(tiny_folder):
    return w.load_stage_b(tiny_folder / SET["stage_b"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layouts_names_are_stage_bs_modules(stage_b, tmp_path, layout):
    stem, down, up = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, {}
    for module in MODULES:
        weight = stage_b.get_parameter(f"{module}.weight")
        halves = [
            torch.randn(2, weight[0].numel(), generator=generator),
            torch.randn(len(weight), 2, generator=generator),
        ]
        name = stem.format(module, flat=module.replace(".", "_"))
        tensors |= {name + down: halves[0], name + up: halves[1]}
        expected[module] = weight + 0.5 * (halves[1] @ halves[0]).view_as(weight)
    save_file(tensors, tmp_path / "b.safetensors")
    lora = w.load_lora(tmp_path / "b.safetensors")
    assert lora.stage == "Stage B" and sorted(lora.changes) == sorted(MODULES)
    before = {module: stage_b.get_parameter(f"{module}.weight") for module in MODULES}
    with w.apply_loras(stage_b, [(lora, 0.5)]):
        for module in MODULES:
            torch.testing.assert_close(stage_b.get_parameter(f"{module}.weight"), expected[module])
    assert all(stage_b.get_parameter(f"{module}.weight") is before[module] for module in MODULES)
    assert "  for a Stage B" in list(describe(tmp_path / "b.safetensors"))


@pytest.mark.parametrize(
    "tensors, says",
    [
        (pair("decoder.clip_mapper") | pair("prior.projection"), "it changes Stage C and Stage B"),
        (pair("decoder.down_blocks.0.0.depthwise"), "another model"),
        (pair("decoder.down_blocks.1.0.1"), "another model"),
    ],
)
def test_what_is_no_lora_of_one_network_is_named(tmp_path, tensors, says):
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(w.WuerstchenError) as caught:
        w.load_lora(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value)


@pytest.mark.parametrize(
    "module, says",
    [
        ("down_blocks.7.0.mapper", "it changes down_blocks.7.0.mapper, which this one has not"),
        ("clip_mapper", "it changes clip_mapper of 32×32, which in this one is 24×32"),
    ],
)
def test_a_lora_of_another_stage_b_is_named(stage_b, tmp_path, module, says):
    save_file(pair(module), tmp_path / "b.safetensors")
    with pytest.raises(w.WuerstchenError, match="a LoRA of another Stage B") as caught:
        w.load_lora(tmp_path / "b.safetensors").check(stage_b)
    assert says in str(caught.value)


def test_a_lora_of_the_other_stage_is_refused(tiny_folder, stage_b, tmp_path):
    save_file(pair("prior.projection"), tmp_path / "c.safetensors")
    with pytest.raises(w.WuerstchenError, match="a LoRA for Stage C, and this is Stage B"):
        w.load_lora(tmp_path / "c.safetensors").check(stage_b)
