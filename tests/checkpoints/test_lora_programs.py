"""LoRAs as OneTrainer, kohya and ComfyUI write them: under three kinds of names, of every Linear and convolution."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import wuerstchen_core as w
from tests.loras import bits, same_bits
from wuerstchen_core.cli import main
from wuerstchen_core.models.stage_c import Prior, StageCConfig

RANK, ALPHA = 3, 2.0


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Prior(StageCConfig(width=32, depth=2, heads=2, text_width=24)).eval()


def halves(module, groups_in_down):
    """As their module makes them: the rank comes out of the lower half, and of a grouped convolution the upper half has
    one group's channels (OneTrainer); or the lower half takes one group's (kohya)."""
    if isinstance(module, nn.Linear):
        return torch.randn(RANK, module.in_features), torch.randn(module.out_features, RANK)
    kernel, groups = module.kernel_size, module.groups
    down = module.in_channels // (groups if groups_in_down else 1)
    up = module.out_channels // (1 if groups_in_down else groups)
    return torch.randn(RANK, down, *kernel), torch.randn(up, RANK, 1, 1)


def layers(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def flat(prefix):
    return lambda module: prefix + module.replace(".", "_")


# name: (module's name in the file, the halves' names, whether the lower half is of one group)
PROGRAMS = {
    "OneTrainer": (flat("lora_prior_unet_"), ("lora_down", "lora_up"), False),
    "OneTrainer, older": (flat("lora_prior_prior_"), ("lora_down", "lora_up"), False),
    "OneTrainer, of diffusers' names": (lambda module: f"prior.{module}", ("lora_A", "lora_B"), False),
    "OneTrainer, as ComfyUI's": (lambda module: f"diffusion_model.{module}", ("lora_A", "lora_B"), False),
    "OneTrainer, as kohya's": (flat("lora_unet_"), ("lora_down", "lora_up"), False),
    "OneTrainer, its backups": (lambda module: f"prior.{module}", ("lora_down", "lora_up"), False),
    "OneTrainer, bare": (lambda module: module, ("lora_A", "lora_B"), False),
    "kohya": (flat("lora_unet_"), ("lora_down", "lora_up"), True),
    "ComfyUI": (lambda module: f"diffusion_model.{module}", ("lora_down", "lora_up"), True),
}


@pytest.fixture(params=PROGRAMS)
def written(request, network, tmp_path):
    """The file and, by module, its halves."""
    named, (down, up), groups_in_down = PROGRAMS[request.param]
    torch.manual_seed(1)
    pairs = {name: halves(module, groups_in_down) for name, module in layers(network).items()}
    tensors = {}
    for module, (lower, upper) in pairs.items():
        tensors |= {f"{named(module)}.{down}.weight": lower, f"{named(module)}.{up}.weight": upper / 8,
                    f"{named(module)}.alpha": torch.tensor(ALPHA)}  # fmt: skip
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors", {module: (lower, upper / 8) for module, (lower, upper) in pairs.items()}


@torch.no_grad()
def test_every_layer_does_what_the_program_trained(network, written):
    """A layer's output is its own plus the adapter's, `op(x, W)`, with W as their `make_weight` has it."""
    path, pairs = written
    lora = w.load_lora(path)
    assert lora.changes.keys() == pairs.keys() and lora.left_out == []
    assert {change.alpha for change in lora.changes.values()} == {ALPHA}
    before = bits(network)
    for name, (lower, upper) in pairs.items():
        module = network.get_submodule(name)
        weight = torch.einsum("or,ri->oi", upper.flatten(1), lower.flatten(1)).view(module.weight.shape) * ALPHA / RANK
        if isinstance(module, nn.Linear):
            x = torch.randn(5, module.in_features)
            expected = module(x) + F.linear(x, weight)
        else:
            x = torch.randn(2, module.in_channels, 6, 5)
            expected = module(x) + F.conv2d(x, weight, padding=module.padding, groups=module.groups)
        with w.apply_loras(network, [(lora, 1.0)]):
            torch.testing.assert_close(network.get_submodule(name)(x), expected, rtol=1e-4, atol=1e-5)
    assert same_bits(network, before)


@torch.no_grad()
def test_a_kohya_convolution_is_two_convolutions(network, tmp_path):
    """The lower half convolves each channel into the rank, the upper half sums them for that channel."""
    down, up = torch.randn(RANK, 1, 3, 3), torch.randn(32, RANK, 1, 1)
    name = "lora_unet_blocks_0_depthwise"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "l.safetensors")
    x = torch.randn(1, 32, 7, 7)
    layer = network.get_submodule("blocks.0.depthwise")
    through = F.conv2d(x.transpose(0, 1), down, padding=1)  # (32, rank, 7, 7): each channel by itself
    expected = layer(x) + torch.einsum("crhw,cr->chw", through, up[:, :, 0, 0])[None]
    with w.apply_loras(network, [(w.load_lora(tmp_path / "l.safetensors"), 1.0)]):
        torch.testing.assert_close(network.get_submodule("blocks.0.depthwise")(x), expected, rtol=1e-4, atol=1e-5)


OTHERS = {
    "lora_prior_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8),
    "lora_prior_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2),
    "lora_prior_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8),
    "text_encoder.text_model.encoder.layers.0.mlp.fc2.lora_A.weight": torch.ones(2, 8),
    "text_encoder.text_model.encoder.layers.0.mlp.fc2.dora_scale": torch.ones(8),
    "bundle_emb.<cat>.clip_g": torch.ones(2, 1280),
    "bundle_emb.<cat>.clip_g_out": torch.ones(2, 1280),
}
LEFT_OUT = [
    "bundle_emb.<cat>.clip_g",
    "bundle_emb.<cat>.clip_g_out",
    "lora_prior_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "text_encoder.text_model.encoder.layers.0.mlp.fc2",
    "text_encoder.text_model.encoder.layers.0.mlp.fc2.dora_scale",
]


def test_what_is_not_of_stage_c_is_named_and_left_out(network, written, tmp_path, capsys):
    from safetensors.torch import load_file

    path, pairs = written
    save_file(load_file(path) | OTHERS, tmp_path / "more.safetensors")
    lora = w.load_lora(tmp_path / "more.safetensors")
    assert lora.changes.keys() == pairs.keys() and sorted(lora.left_out) == LEFT_OUT
    assert main(["inspect", str(tmp_path / "more.safetensors")]) == 0
    assert "  left out       6, not of Stage C: bundle_emb.<cat>.clip_g, " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, says",
    [
        ("lora_prior_unet_blocks_2_attention_to_q.dora_scale", "DoRA, biases"),
        ("lora_prior_unet_down_blocks_0_attention_to_q.lora_down.weight", "another model"),
        ("lora_unet_blocks_2_attention_to_x.lora_down.weight", "another model"),
        ("lora_prior_unet_blocks_x_attention_to_q.lora_down.weight", "another model"),
    ],
)
def test_what_is_more_than_a_lora_or_of_another_is_refused(tmp_path, name, says):
    good = {f"prior.blocks.2.attention.to_k.lora_{half}.weight": torch.ones(shape)
            for half, shape in (("A", (2, 32)), ("B", (32, 2)))}  # fmt: skip
    save_file(good | {name: torch.ones(2, 32)}, tmp_path / "bad.safetensors")
    with pytest.raises(w.WuerstchenError, match=says):
        w.load_lora(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("kind", ["hada_w1_a", "lokr_w1", "oft_blocks"])
def test_other_kinds_of_adapters_are_named(tmp_path, kind):
    save_file({f"lora_unet_blocks_2_attention_to_q.{kind}": torch.ones(2, 32)}, tmp_path / "other.safetensors")
    with pytest.raises(w.WuerstchenError, match=rf"a LoRA of a kind that is not supported \(.{kind}\)"):
        w.load_lora(tmp_path / "other.safetensors")


@pytest.mark.parametrize("module", ["lora_unet_blocks_2_attention_to_q", "prior.blocks.2.attention.to_q"])
@pytest.mark.parametrize("kind", ["hada_w1_a", "lokr_w2", "lokr_t2"])
def test_inspect_says_what_another_kind_is(tmp_path, capsys, module, kind):
    path = tmp_path / "other.safetensors"
    save_file({f"{module}.{kind}": torch.ones(2, 32), f"{module}.alpha": torch.tensor(1.0)}, path)
    assert main(["inspect", str(path)]) == 2
    assert "this is a LoHa or LoKr, not a plain LoRA: try ComfyUI's own LoRA loaders" in capsys.readouterr().err


def test_one_module_under_two_names_is_refused(tmp_path):
    names = ("lora_unet_blocks_2_attention_to_q.lora_down.weight", "prior.blocks.2.attention.to_q.lora_A.weight")
    save_file({name: torch.ones(2, 32) for name in names}, tmp_path / "two.safetensors")
    with pytest.raises(w.WuerstchenError, match="blocks.2.attention.to_q twice"):
        w.load_lora(tmp_path / "two.safetensors")


def test_a_change_beyond_the_weights_precision_is_refused(network, tmp_path):
    tensors = {
        "prior.out.1.lora_A.weight": torch.full((2, 32), 1e19),
        "prior.out.1.lora_B.weight": torch.full((32, 2), 1e19),
    }
    save_file(tensors, tmp_path / "loud.safetensors")
    before, lora = bits(network), w.load_lora(tmp_path / "loud.safetensors")
    with pytest.raises(w.WuerstchenError, match="change out.1 beyond the range of float32"):
        with w.apply_loras(network, [(lora, 2.0)]):
            pass
    assert same_bits(network, before)
