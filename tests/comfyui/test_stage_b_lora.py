"""LoRAs for Stage B, and those of a set's distilled networks, by our node and by ComfyUI's."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.reference import distance
from wuerstchen_core.checkpoints.sets import DISTILLED

MODULES = ["down_blocks.1.3.attention.to_q", "up_blocks.0.0.channelwise.4", "clip_mapper", "embedding.1", "clf.1"]
LAYOUTS = {"ours": ("decoder.", ".lora_A.weight", ".lora_B.weight"),
           "comfyui": ("diffusion_model.", ".lora_down.weight", ".lora_up.weight")}  # fmt: skip


def weights_of(model):
    """The weights that a MODEL computes with."""
    import comfy.model_management as management

    management.load_models_gpu([model], force_patch_weights=True)
    return {module: model.model.diffusion_model.get_submodule(module).weight.clone() for module in MODULES}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("node", ["LoraLoaderModelOnly", "WuerstchenLoadLoRA"])
def test_a_lora_for_stage_b_changes_what_it_should(call, tinies, models, layout, node):
    prefix, down, up = LAYOUTS[layout]
    before = weights_of(tinies.model_b)
    generator = torch.Generator().manual_seed(0)
    halves = {}
    for module, weight in before.items():
        shapes = (2, weight[0].numel()), (len(weight), 2)
        halves[module] = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors = {f"{prefix}{module}{half}": one for module, pair in halves.items()
               for half, one in zip((down, up), pair, strict=True)}  # fmt: skip
    save_file(tensors, models / "loras" / "b.safetensors")
    options = {"LoraLoaderModelOnly": {"lora_name": "b.safetensors", "strength_model": 0.5},
               "WuerstchenLoadLoRA": {"file": "b.safetensors", "strength": 0.5}}[node]  # fmt: skip
    after = weights_of(call(node, model=tinies.model_b, **options))
    for module, (first, second) in halves.items():
        change = 0.5 * (second @ first).view_as(before[module])
        assert distance(after[module] - before[module], change) < 1e-4
    weights_of(tinies.model_b)


def test_the_loras_of_a_sets_distilled_networks_are_listed(call, nodes, tinies, tiny_folder, models):
    folder = models / "wuerstchen" / "own"
    shutil.copytree(tiny_folder, folder)
    file = folder / DISTILLED["stage_b"]
    weight = weights_of(tinies.model_b)["clip_mapper"]
    save_file({"decoder.clip_mapper.lora_A.weight": torch.ones(1, weight.shape[1]),
               "decoder.clip_mapper.lora_B.weight": torch.ones(weight.shape[0], 1)}, file)  # fmt: skip
    name = "own: few steps (Stage B)"
    loader = nodes["WuerstchenLoadLoRA"]
    assert name in loader.define_schema().inputs[1].options
    stamp = loader.fingerprint_inputs(model=None, file=name, strength=1.0)
    changed = call("WuerstchenLoadLoRA", model=tinies.model_b, file=name, strength=1.0)
    torch.testing.assert_close(weights_of(changed)["clip_mapper"], weight + 1)
    with pytest.raises(Exception, match="a LoRA for Stage B, and this is Stage C"):
        call("WuerstchenLoadLoRA", model=tinies.model_c, file=name, strength=1.0)
    shutil.copy(file, folder / "copy")
    (folder / "copy").replace(file)
    assert loader.fingerprint_inputs(model=None, file=name, strength=1.0) != stamp
    weights_of(tinies.model_b)
