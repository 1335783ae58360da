"""LoRAs in ComfyUI's hands."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import wuerstchen_core as w
from tests.loras import STAGE_C, bits, pair, same_bits
from tests.reference import distance
from wuerstchen_core.pipeline import sample_stage_c


@pytest.fixture
def stage_c(tiny_folder):
    return w.load_stage_c(tiny_folder / STAGE_C)


@pytest.fixture
def comfy(run, style, models, tmp_path):
    """ComfyUI's models/loras holds style.safetensors; the set's Stage C and a way to sample it."""
    (models / "loras" / "sub").mkdir()
    (models / "loras" / "style.safetensors").write_bytes((tmp_path / "style.safetensors").read_bytes())
    (models / "loras" / "sub" / "other.bin").write_bytes((tmp_path / "style.safetensors").read_bytes())
    generator = torch.Generator().manual_seed(4)
    text, latent = torch.randn(1, 77, 32, generator=generator), torch.zeros(1, 16, 3, 3)

    def sample(stage_c):
        inputs = {"steps": 3, "cfg": 1.0, "sampler": "ddpm", "schedule": "even", "denoise": 1.0, "seed": 3}
        texts = {"positive": [[text, {}]], "negative": [[text, {}]]}
        return run("WuerstchenStageCSampler", stage_c=stage_c, latent={"samples": latent}, **texts, **inputs)["samples"]

    def expected(network, *loras):
        with w.apply_loras(network, loras):
            return sample_stage_c(network, latent, text, steps=3, cfg=1.0, seed=3)

    return sample, expected


@pytest.fixture
def loaded(run, models, tiny_folder):
    (models / "diffusion_models" / "c.safetensors").symlink_to(tiny_folder / STAGE_C)
    return run("WuerstchenLoadStageC", file="c.safetensors")


def test_the_node_gives_a_stage_c_with_the_lora_and_leaves_the_other(run, comfy, loaded, stage_c, style):
    sample, expected = comfy
    plain, before = sample(loaded), bits(loaded.network)

    def add(model, file, strength):
        return run("WuerstchenLoadLoRA", stage_c=model, file=file, strength=strength)

    some = add(loaded, "style.safetensors", 0.8)
    two = add(some, "sub/other.bin", -0.5)
    none = add(loaded, "style.safetensors", 0.0)
    near = {"rtol": 1e-4, "atol": 1e-5}
    for _ in range(2):  # in any order, and again
        torch.testing.assert_close(sample(two), expected(stage_c, (style, 0.3)), **near)
        assert sample(loaded).equal(plain) and sample(none).equal(plain)
        torch.testing.assert_close(sample(some), expected(stage_c, (style, 0.8)), **near)
        assert distance(sample(some), plain) > 0.01 and distance(sample(some), sample(two)) > 0.01
        assert same_bits(loaded.network, before)
    torch.testing.assert_close(plain, expected(stage_c), **near)


def test_a_stage_c_with_loras_asks_for_the_memory_of_its_changed_weights(run, comfy, loaded, monkeypatch):
    """They lie beside those of the network while it samples; a weight that several change is one."""
    import comfy.model_management as management

    asked = []

    def load(models, memory_required, force_full_load):
        asked.append(memory_required)

    monkeypatch.setattr(management, "load_models_gpu", load)
    model = loaded
    for _ in range(2):
        model.load(1000)
        model = run("WuerstchenLoadLoRA", stage_c=model, file="style.safetensors", strength=1.0)
    model.load(1000)
    assert asked == [1000, 1000 + 8 * 32 * 32 * 4, 1000 + 8 * 32 * 32 * 4]


def test_layers_that_cast_their_weights_take_loras(run, comfy, tiny_folder, stage_c, style, module, models):
    """What ComfyUI's partial loading comes down to: weights of one precision, cast by the layer to the input's."""

    class Casting(torch.nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    class CastingConvolution(torch.nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    class Operations:
        Linear, Conv2d = Casting, CastingConvolution

    sample, expected = comfy
    network = w.load_stage_c(tiny_folder / STAGE_C, dtype=torch.bfloat16, operations=Operations)
    host = module("nodes.host.loading")
    patcher = host.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))
    model = host.Model(network, patcher, torch.float32, splits=True)
    with_lora = run("WuerstchenLoadLoRA", stage_c=model, file="style.safetensors", strength=5.0)
    assert distance(sample(with_lora), expected(stage_c, (style, 5.0))) < 0.03
    assert distance(sample(model), expected(stage_c, (style, 5.0))) > 0.2


def test_the_node_lists_comfyuis_loras_and_takes_no_other_path(run, nodes, comfy, loaded, tmp_path):
    file = nodes["WuerstchenLoadLoRA"].define_schema().inputs[1]
    assert sorted(file.options) == ["style.safetensors", "sub/other.bin"]
    for name in ("none.safetensors", str(tmp_path / "style.safetensors"), "../loras/style.safetensors", ""):
        with pytest.raises(ValueError, match="there is no such file in models/loras: put it into it"):
            run("WuerstchenLoadLoRA", stage_c=loaded, file=name, strength=1.0)


def test_a_lora_of_another_network_is_refused_by_its_node(run, comfy, loaded, models):
    save_file(pair("blocks.8.attention.to_q"), models / "loras" / "style.safetensors")
    with pytest.raises(ValueError, match="style.safetensors: a LoRA of another Stage C"):
        run("WuerstchenLoadLoRA", stage_c=loaded, file="style.safetensors", strength=1.0)
