"""LoRA for Stage C against diffusers and peft: what they write is read, and does there what it does here."""

import pytest
import torch
from diffusers import WuerstchenPriorPipeline
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import wuerstchen_core as w
from tests.loras import ATTENTION, EVERYTHING, ROUNDING, STAGE_C, adapter, bits, outputs, same_bits
from tests.reference import distance
from wuerstchen_core.models.lora import MODULES

# Every way in which diffusers and peft write a LoRA: (network, folder) -> the file or folder; those that tell alpha
# (one more is `adapter`)


def weights_with_metadata(prior, folder):
    layers, metadata = get_peft_model_state_dict(prior), prior.peft_config["default"].to_dict()
    WuerstchenPriorPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    return folder


def peft_names_with_alpha(prior, folder):
    layers = get_peft_model_state_dict(prior)
    modules = {name.split(".lora_")[0] for name in layers}
    alphas = {f"prior.{module}.alpha": torch.tensor(6.0) for module in modules}
    save_file({f"prior.{name}": tensor for name, tensor in layers.items()} | alphas, folder / "alpha.safetensors")
    return folder / "alpha.safetensors"


def kept_whole(prior, folder):
    """With the adapter's name, as a state dictionary has it."""
    layers = {name: tensor for name, tensor in prior.state_dict().items() if "lora_" in name}
    assert "blocks.2.attention.to_q.lora_A.default.weight" in layers
    torch.save({"unet": layers | {f"{n.split('.lora_')[0]}.alpha": torch.tensor(6) for n in layers}}, folder / "l.bin")
    return folder / "l.bin"


# … and those that tell none: diffusers takes the rank for it


def weights(prior, folder):
    """The training script's way."""
    WuerstchenPriorPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(prior))
    return folder


def weights_bin(prior, folder):
    layers = get_peft_model_state_dict(prior)
    WuerstchenPriorPipeline.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=False)
    return folder


def old_names(prior, folder):
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(prior))
    assert "blocks.2.attention.to_q.lora.down.weight" in layers
    WuerstchenPriorPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def oldest_names(prior, folder):
    """As attention processors were saved, before peft."""
    names = {".lora_A": "_lora.down", ".lora_B": "_lora.up", "attention.to": "attention.processor.to", "out.0": "out"}
    layers = {}
    for name, tensor in get_peft_model_state_dict(prior).items():
        for new, old in names.items():
            name = name.replace(new, old)
        layers[name] = tensor
    assert "blocks.2.attention.processor.to_out_lora.down.weight" in layers
    WuerstchenPriorPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def linear_layers(prior, folder):
    names = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}
    layers = {
        f"unet.{name.replace(half, old)}": tensor
        for name, tensor in get_peft_model_state_dict(prior).items()
        for half, old in names.items()
        if half in name
    }
    save_file(layers, folder / "linear.safetensors")
    return folder / "linear.safetensors"


WITH_ALPHA = (adapter, weights_with_metadata, peft_names_with_alpha, kept_whole)
WITHOUT_ALPHA = (weights, weights_bin, old_names, oldest_names, linear_layers)


@pytest.mark.parametrize("write", [*WITH_ALPHA, *WITHOUT_ALPHA])
def test_what_diffusers_writes_does_here_what_it_does_there(stage_c, theirs, config, tmp_path, write):
    theirs.add_adapter(config())
    lora = w.load_lora(write(theirs, tmp_path))
    if write in WITHOUT_ALPHA:
        for name, module in theirs.named_modules():
            if name.endswith(tuple(ATTENTION)) and hasattr(module, "scaling"):
                module.scaling["default"] = 1.0  # as it has it after reading such a file: see below
    for name, change in lora.changes.items():
        torch.testing.assert_close(change.delta("cpu"), theirs.get_submodule(name).get_delta_weight("default"))
    expected = outputs(theirs)
    assert distance(outputs(stage_c, (lora, 1.0)), expected) < ROUNDING
    assert distance(outputs(stage_c), expected) > 0.01
    assert {change.alpha for change in lora.changes.values()} == {6 if write in WITH_ALPHA else 4}


@pytest.mark.parametrize("write", [adapter, weights, weights_with_metadata])
def test_what_diffusers_reads_does_there_what_it_does_here(stage_c, theirs, config, tmp_path, write):
    """From the file, with whatever it takes for alpha."""
    source = WuerstchenPrior(c=32, c_cond=32, depth=2, nhead=2)
    source.add_adapter(config(EVERYTHING))
    path = write(source, tmp_path)
    folder = path if path.is_dir() else path.parent
    state, alphas, metadata = WuerstchenPriorPipeline.lora_state_dict(folder, return_lora_metadata=True)
    prefix = None if write is adapter else "prior"
    theirs.load_lora_adapter(state, prefix=prefix, network_alphas=alphas, metadata=metadata)
    assert distance(outputs(stage_c, (w.load_lora(path), 1.0)), outputs(theirs)) < ROUNDING


def test_a_folder_of_peft_has_its_alpha_in_a_file_of_its_own(stage_c, theirs, config, tmp_path):
    """With ranks and alphas of single modules, and rsLoRA's scale."""
    patterns = {"rank_pattern": {"to_q": 3, "^blocks.2.attention.to_k": 2}, "use_rslora": True,
                "alpha_pattern": {"attention.to_v": 1, r"blocks\.5\..*\.0": 9}}  # fmt: skip
    model = get_peft_model(theirs, config(EVERYTHING, **patterns))
    model.save_pretrained(tmp_path)
    lora = w.load_lora(tmp_path)
    told = {name: (change.rank, change.alpha) for name, change in lora.changes.items()}
    assert told["blocks.2.attention.to_q"] == (3, 6) and told["blocks.2.attention.to_k"] == (2, 6)
    assert told["blocks.5.attention.to_v"] == (4, 1) and told["blocks.5.attention.to_out.0"] == (4, 9)
    assert len(told) == 12 + 8
    expected = outputs(theirs)
    assert distance(outputs(stage_c, (lora, 1.0)), expected) < ROUNDING
    assert distance(outputs(stage_c, (w.load_lora(tmp_path / "adapter_model.safetensors"), 1.0)), expected) < ROUNDING


def test_a_stranger_beside_a_file_is_not_its_configuration(theirs, config, tmp_path):
    """ComfyUI's users keep all LoRAs in one folder."""
    theirs.add_adapter(config())
    path = weights(theirs, tmp_path) / "pytorch_lora_weights.safetensors"
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 100}')
    assert {change.alpha for change in w.load_lora(path).changes.values()} == {4}


@pytest.mark.parametrize("strength", [0.0, 0.8, 1.0, -0.5])
def test_strength_is_diffusers_scale(stage_c, theirs, config, tmp_path, strength):
    theirs.add_adapter(config(EVERYTHING))
    lora = w.load_lora(adapter(theirs, tmp_path))
    theirs.set_adapters("default", strength)
    assert distance(outputs(stage_c, (lora, strength)), outputs(theirs)) < ROUNDING


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_add_up(stage_c, theirs, config, tmp_path):
    loras = []
    for name, targets, rank, strength in (("one", ATTENTION, 4, 0.8), ("two", EVERYTHING, 2, -0.3)):
        theirs.add_adapter(config(targets, seed=rank, r=rank), name)
        theirs.save_lora_adapter(tmp_path / name, adapter_name=name)
        loras.append((w.load_lora(tmp_path / name), strength))
    theirs.set_adapters(["one", "two"], [0.8, -0.3])
    both = outputs(stage_c, *loras)
    assert distance(both, outputs(theirs)) < ROUNDING
    assert distance(outputs(stage_c, loras[0]), both) > 0.01 and distance(outputs(stage_c, loras[1]), both) > 0.01
    with w.apply_loras(stage_c, loras[:1]):
        assert distance(outputs(stage_c, loras[1]), both) < ROUNDING


@pytest.fixture
def lora(theirs, config, tmp_path):
    theirs.add_adapter(config(EVERYTHING))
    return w.load_lora(adapter(theirs, tmp_path / "all"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once_and_are_themselves_again_afterwards(tiny_folder, lora, dtype):
    network = w.load_stage_c(tiny_folder / STAGE_C, dtype=dtype)
    before, parameters = bits(network), list(network.parameters())
    with w.apply_loras(network, [(lora, 0.7), (lora, 0.4)]):
        for name, change in lora.changes.items():
            weight = network.get_submodule(name).weight
            delta = (change.up.double() @ change.down.double()) * (6 / 4) * 1.1
            exact = before[f"{name}.weight"].double() + delta.view_as(weight)
            assert weight.dtype == dtype and not weight.requires_grad
            assert ((weight - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
        assert network.get_submodule("blocks.0.depthwise").weight.equal(before["blocks.0.depthwise.weight"])
    assert same_bits(network, before)
    assert all(now is then for now, then in zip(network.parameters(), parameters, strict=True))


def test_an_error_within_puts_the_weights_back(stage_c, lora):
    before = bits(stage_c)
    with pytest.raises(ZeroDivisionError), w.apply_loras(stage_c, [(lora, 1.0)]):
        assert not same_bits(stage_c, before)
        1 / 0
    assert same_bits(stage_c, before)


def test_the_file_of_the_network_is_not_written_to(tiny_folder, stage_c, lora):
    content = (tiny_folder / STAGE_C).read_bytes()
    outputs(stage_c, (lora, 1.0))
    assert (tiny_folder / STAGE_C).read_bytes() == content


def test_a_lora_of_no_strength_changes_not_a_bit(stage_c, lora):
    before = bits(stage_c)
    with w.apply_loras(stage_c, [(lora, 0.0)]):
        assert same_bits(stage_c, before)


def test_modules_are_the_networks_linears_and_1x1_convolutions(stage_c):
    """All of them, and nothing else."""
    changeable = {
        name
        for name, module in stage_c.named_modules()
        if isinstance(module, torch.nn.Linear) or isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1)
    }
    assert {name for name, _ in stage_c.named_modules() if MODULES.fullmatch(name)} == changeable
