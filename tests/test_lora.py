"""LoRA for Stage C against diffusers and peft: what they write is read, and does there what it does here."""

import contextlib
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from diffusers import WuerstchenPriorPipeline
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import wuerstchen_core as w
from tests.reference import distance
from wuerstchen_core.checkpoints.files import SET, describe
from wuerstchen_core.checkpoints.lora import MODULES
from wuerstchen_core.cli import main
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.pipeline import sample_stage_c
from wuerstchen_core.training import lora as training_lora
from wuerstchen_core.training.lora import TARGETS, add_lora, save_lora

ATTENTION = list(TARGETS)
EVERYTHING = [*TARGETS, "kv_mapper.1", "mapper", "channelwise.0", "channelwise.4", "cond_mapper.0", "cond_mapper.2",
              "projection", "out.1"]  # fmt: skip
STAGE_C = SET["stage_c"]
ROUNDING = 1e-5  # float32's


@pytest.fixture
def stage_c(tiny_folder):
    return w.load_stage_c(tiny_folder / STAGE_C)


@pytest.fixture
def theirs(stage_c):
    """diffusers' network of the same weights."""
    prior = WuerstchenPrior(c=32, c_cond=32, depth=2, nhead=2).eval().requires_grad_(False)
    prior.load_state_dict(stage_c.state_dict())
    return prior


@pytest.fixture
def config():
    def made(targets=ATTENTION, seed=0, **options):
        torch.manual_seed(seed)
        return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False, **options})

    return made


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 16, 5, 4, generator=generator),
        torch.tensor([0.3, 0.9]),
        torch.randn(2, 9, 32, generator=generator),
    )


def outputs(network, *loras):
    """a and b of the noise (x - a) / |1 - b|, which near its pole would be rounding."""
    seen = []
    hook = network.out.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad(), w.apply_loras(network, loras) if loras else contextlib.nullcontext():
        network(*inputs())
    hook.remove()
    return seen[0]


def bits(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same_bits(network, before):
    now = network.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(now[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in before.items()
    )


# Every way in which diffusers and peft write a LoRA: (network, folder) -> the file or folder; those that tell alpha


def adapter(prior, folder):
    prior.save_lora_adapter(folder, adapter_name="default")
    return folder / "pytorch_lora_weights.safetensors"


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


# Files that are none, or another model's

PAIR = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}


def pair(module="blocks.2.attention.to_q", **changed):
    return {f"{module}.{half}.weight": tensor for half, tensor in (PAIR | changed).items()}


BAD = {
    "a network": ({"projection.weight": torch.ones(4, 2, 1, 1)}, "not a LoRA (the names of its tensors begin with"),
    "of SDXL": (
        pair("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        "another model: Stage C has nothing to change in down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "of a text encoder": (
        pair() | pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
        "nothing to change in text_encoder.text_model",
    ),
    "of a 3x3 convolution": (pair("blocks.0.depthwise"), "nothing to change in blocks.0.depthwise"),
    "half": ({"blocks.2.attention.to_q.lora_A.weight": torch.ones(2, 32)}, "blocks.2.attention.to_q has no up half"),
    "two ranks": (pair(lora_B=torch.ones(32, 3)), "of ranks 2 and 3"),
    "no matrix": (pair(lora_A=torch.ones(2, 32, 3, 3)), "shape 2×32×3×3"),
    "a vector": (pair(lora_A=torch.ones(2)), "shape 2 and is no matrix"),
    "empty": (pair(lora_A=torch.ones(0, 32), lora_B=torch.ones(32, 0)), "shape 0×32"),
    "NaN": (pair(lora_B=torch.full((32, 2), torch.nan)), "to_q.lora_B.weight is not finite"),
    "infinite": (pair(lora_A=torch.full((2, 32), torch.inf)), "to_q.lora_A.weight is not finite"),
    "integers": (pair(lora_A=torch.ones(2, 32, dtype=torch.int8)), "to_q.lora_A.weight holds whole numbers"),
    "NaN alpha": (pair() | {"blocks.2.attention.to_q.alpha": torch.tensor(torch.nan)}, "alpha is not finite"),
    "alpha of two": (pair() | {"blocks.2.attention.to_q.alpha": torch.ones(2)}, "alpha is no number"),
    "DoRA": (
        pair() | {"blocks.2.attention.to_q.lora_magnitude_vector": torch.ones(32)},
        "it holds blocks.2.attention.to_q.lora_magnitude_vector: a LoRA of another kind",
    ),
    "bias": (pair() | {"blocks.2.attention.to_q.lora_B.bias": torch.ones(32)}, "lora_B.bias: a LoRA of another kind"),
    "two adapters": (pair() | {f"prior.{name}": tensor for name, tensor in pair().items()}, "to_q twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_in_one_line(tmp_path, case):
    tensors, says = BAD[case]
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(w.WuerstchenError) as caught:
        w.load_lora(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata, says",
    [
        ("{", "not a configuration"),
        ("[1]", "not a configuration"),
        ('{"lora_alpha": "much"}', "lora_alpha is no number"),
        ('{"lora_alpha": [1]}', "lora_alpha is no number"),
        ('{"lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"prior.alpha_pattern": {"(": 1}}', "alpha_pattern"),
        ('{"alpha_pattern": 3}', "alpha_pattern"),
        ('{"prior.use_dora": true}', "not supported (use_dora)"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path, metadata, says):
    path = tmp_path / "bad.safetensors"
    save_file(pair(), path, {"lora_adapter_metadata": metadata})
    with pytest.raises(w.WuerstchenError) as caught:
        w.load_lora(path)
    assert "bad.safetensors" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize(
    "tensors, says",
    [
        (pair(lora_A=torch.ones(2, 48)), "to_q of 32×48, which in this one, of width 32, is 32×32"),
        (pair("blocks.8.attention.to_q"), "blocks.8.attention.to_q, which this one, of depth 2, has not"),
        (pair("blocks.1.attention.to_q"), "blocks.1.attention.to_q, which this one"),
        (pair("projection"), "projection of 32×32, which in this one, of width 32, is 32×16"),
    ],
)
def test_a_lora_of_another_stage_c_is_named_by_its_first_module_and_changes_nothing(stage_c, tmp_path, tensors, says):
    save_file(tensors, tmp_path / "other.safetensors")
    other, before = w.load_lora(tmp_path / "other.safetensors"), bits(stage_c)
    save_file(pair(), tmp_path / "good.safetensors")
    good = w.load_lora(tmp_path / "good.safetensors")
    with pytest.raises(w.WuerstchenError, match="other.safetensors") as caught:
        outputs(stage_c, (good, 1.0), (other, 1.0))
    assert says in str(caught.value) and same_bits(stage_c, before)
    with pytest.raises(w.WuerstchenError, match="strength is nan"):
        outputs(stage_c, (good, float("nan")))
    assert same_bits(stage_c, before)


def test_a_lora_in_the_place_of_a_network_is_sent_to_its_loader(tmp_path):
    save_file(pair(), tmp_path / "style.safetensors")
    with pytest.raises(w.WuerstchenError, match="this is a LoRA.*load_lora.*here goes a stage_c"):
        w.load_stage_c(tmp_path / "style.safetensors")


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a.lora_A.weight": Code()}, tmp_path / "code.bin")
    with pytest.raises(w.WuerstchenError, match="none of it was run"):
        w.load_lora(tmp_path / "code.bin")
    assert not (tmp_path / "ran").exists()


# The command line


@pytest.fixture
def style(tmp_path, monkeypatch):
    """The file style.safetensors in the working folder."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(3)
    halves = [
        pair(f"blocks.{block}.attention.{name}", **{half: torch.randn(PAIR[half].shape, generator=generator) / 4
                                                    for half in PAIR})
        for block in (2, 5) for name in ATTENTION
    ]  # fmt: skip
    tensors = {name: tensor for half in halves for name, tensor in half.items()}
    save_file(tensors, "style.safetensors", {"lora_adapter_metadata": json.dumps({"prior.lora_alpha": 3})})
    return w.load_lora("style.safetensors")


def drawn(model, *loras):
    with w.apply_loras(model.stage_c, loras):
        picture = model.generate("a cat", steps_c=2, steps_b=2)[0]
    return (picture * 255).round().byte().numpy()


def test_generate_takes_loras_with_their_strengths(tiny, tiny_folder, style, tmp_path):
    few = ["--steps-c", "2", "--steps-b", "2", "--model", str(tiny_folder)]
    odd = tmp_path / "C:odd:2.5x"
    odd.mkdir()
    (odd / "a:b.safetensors").write_bytes((tmp_path / "style.safetensors").read_bytes())
    plain = drawn(tiny)
    for number, (given, total, told) in enumerate(
        [
            (["style.safetensors"], 1.0, "style.safetensors:1"),
            (["style.safetensors:0.8"], 0.8, "style.safetensors:0.8"),
            (["style.safetensors:-.5", f"{odd}/a:b.safetensors:2"], 1.5, "style.safetensors:-0.5, a:b.safetensors:2"),
            ([f"{odd}/a:b.safetensors"], 1.0, "a:b.safetensors:1"),
        ]
    ):
        arguments = [argument for text in given for argument in ("--lora", text)]
        assert main(["generate", "a cat", "-o", f"{number}.png", *arguments, *few]) == 0
        with Image.open(f"{number}.png") as picture:
            seen = np.array(picture).astype(int)
            assert picture.text["loras"] == told
        assert np.abs(seen - drawn(tiny, (style, total))).max() <= 1
        assert np.abs(seen - plain).max() > 8
    assert main(["generate", "a cat", "-o", "plain.png", *few]) == 0
    assert "loras" not in Image.open("plain.png").text and np.array_equal(np.array(Image.open("plain.png")), plain)


@pytest.mark.parametrize("given", ["none.safetensors", "none.safetensors:0.5", "style.safetensors:strong"])
def test_a_lora_that_is_not_there_is_named(tiny_folder, style, capsys, given):
    assert main(["generate", "a cat", "--lora", given, "--model", str(tiny_folder)]) == 2
    name = given.removesuffix(":0.5")
    assert capsys.readouterr().err.splitlines()[-1] == f"wuerstchen: {name}: there is no such file"


def test_inspect_tells_what_a_lora_is(style, theirs, config, tmp_path, capsys):
    assert main(["inspect", "style.safetensors"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("style.safetensors: safetensors, 0.0 MB")
    assert told[1:] == [
        "lora: load_lora takes it",
        "  for a Stage C  of width 32",
        "  modules        8: attention.to_k, attention.to_out.0, attention.to_q, attention.to_v",
        "  rank           2",
        "  alpha          3",
        "  parameters     1,024",
        "  dtype          float32",
    ]
    theirs.add_adapter(config(EVERYTHING, rank_pattern={"mapper": 3}))
    told = list(describe(adapter(theirs, tmp_path / "all")))
    assert told[2:5:2] == ["  for a Stage C  of width 32", "  rank           3, 4"]


# In ComfyUI's hands


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
    host = module("nodes.host")
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


# Training


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING, ["blocks.2.attention.to_q", "kv_mapper.1"]])
def test_what_training_writes_is_read_by_us_and_by_diffusers(tiny_folder, stage_c, theirs, tmp_path, targets):
    trained = w.load_stage_c(tiny_folder / STAGE_C)
    parameters = add_lora(trained, rank=3, alpha=7.5, targets=targets)
    torch.testing.assert_close(outputs(trained), outputs(stage_c), rtol=0, atol=0)  # at first it changes nothing
    torch.manual_seed(0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(trained, tmp_path / "pytorch_lora_weights.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    lora = w.load_lora(tmp_path)
    assert {(change.rank, change.alpha, change.scale) for change in lora.changes.values()} == {(3, 7.5, 2.5)}
    assert len(lora.changes) == {4: 8, 12: 20, 2: 3}[len(targets)] == len(parameters) / 2
    state, alphas, metadata = WuerstchenPriorPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    theirs.load_lora_adapter(state, prefix="prior", network_alphas=alphas, metadata=metadata)
    ours = outputs(stage_c, (lora, 1.0))
    assert distance(ours, outputs(trained)) < ROUNDING and distance(ours, outputs(theirs)) < ROUNDING
    assert distance(ours, outputs(stage_c)) > 0.002


def test_only_the_lora_is_trained_and_in_float32(tiny_folder, tmp_path):
    network = w.load_stage_c(tiny_folder / STAGE_C, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in network.named_parameters()}
    parameters = add_lora(network, rank=2, alpha=2)
    assert len(parameters) == 16 and {parameter.dtype for parameter in parameters} == {torch.float32}
    assert sum(parameter.requires_grad for parameter in network.parameters()) == 16
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    x, t, text = inputs()
    for _ in range(2):  # the first half gets no gradient while the second is zero
        optimizer.zero_grad()
        network(x.bfloat16(), t, text.bfloat16()).float().square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in network.named_parameters()}
    assert all(tensor.equal(kept[name]) for name, tensor in before.items())
    save_lora(network, tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora.safetensors").values()} == {torch.float32}
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert set(file.keys()) > {"prior.blocks.2.attention.to_q.lora_A.weight"}
        assert json.loads(file.metadata()["lora_adapter_metadata"])["prior.lora_alpha"] == 2


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rank": 0, "alpha": 1}, "rank is 0"),
        ({"rank": 4, "alpha": 0}, "alpha is 0"),
        ({"rank": 4, "alpha": 1, "targets": ["to_q", "to_x"]}, "to_x: there is no such module"),
        ({"rank": 4, "alpha": 1, "targets": ["depthwise"]}, "depthwise: there is no such module.*channelwise.0"),
        ({"rank": 4, "alpha": 1, "targets": ["o_q"]}, "o_q: there is no such module"),
        ({"rank": 4, "alpha": 1, "targets": []}, "no targets"),
    ],
)
def test_what_cannot_be_trained_is_named(options, says):
    network = Prior(StageCConfig(width=32, depth=1, heads=2, text_width=32))
    names = list(network.state_dict())
    with pytest.raises(w.WuerstchenError, match=says):
        add_lora(network, **options)
    assert list(network.state_dict()) == names


@pytest.fixture
def teach(tiny_folder, emoji, tmp_path, monkeypatch):
    """teach(folder, **options): trains on three emoji in two styles, and gives what wuerstchen train returns."""
    monkeypatch.chdir(tmp_path)
    files = {
        "init": tiny_folder / STAGE_C,
        "text_encoder": tiny_folder / SET["text_encoder_c"],
        "semantic_compressor": tiny_folder / SET["semantic_compressor"],
        "stage_a": tiny_folder / SET["stage_a"],
        "stage_b": tiny_folder / SET["stage_b"],
    }
    few = {"data": emoji, "size": 64, "batch": 2, "workers": 0, "warm_up": 0, "cool_down": 0, "learning_rate": 0.01,
           "steps": 4, "save_every": 2, "ema_every": 1, "sample_every": 0, "rank": 3, "alpha": 6}  # fmt: skip

    def teach(folder, **options):
        options = files | few | {"folder": folder} | options
        given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return main(["train", "lora", "--config", "mini", *given])

    return teach


def checkpoint(folder):
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("targets", ['["to_q", "to_out.0"]', json.dumps(EVERYTHING)])
def test_a_trained_lora_does_here_and_in_diffusers_what_its_average_does(
    teach, tiny_folder, stage_c, theirs, tmp_path, targets
):
    before = (tiny_folder / STAGE_C).read_bytes()
    assert teach("run", targets=targets) == 0
    assert (tiny_folder / STAGE_C).read_bytes() == before
    lora = w.load_lora("run/lora.safetensors")
    assert {(change.rank, change.alpha) for change in lora.changes.values()} == {(3, 6)}

    averaged = w.load_stage_c(tiny_folder / STAGE_C)
    add_lora(averaged, rank=3, alpha=6, targets=json.loads(targets))
    learned = {name.removeprefix("base.network."): value for name, value in checkpoint("run")["averaged"].items()}
    assert learned.keys() == {name for name, value in averaged.named_parameters() if value.requires_grad}
    averaged.load_state_dict(learned, strict=False)

    state, alphas, metadata = WuerstchenPriorPipeline.lora_state_dict(
        tmp_path / "run", weight_name="lora.safetensors", return_lora_metadata=True
    )
    theirs.load_lora_adapter(state, prefix="prior", network_alphas=alphas, metadata=metadata)
    ours = outputs(stage_c, (lora, 1.0))
    assert distance(ours, outputs(averaged)) < ROUNDING and distance(ours, outputs(theirs)) < ROUNDING
    assert distance(ours, outputs(stage_c)) > 1e-3


def test_the_weights_under_a_lora_stay_as_they_are_and_are_in_no_checkpoint(teach, stage_c, monkeypatch):
    tasks = []
    build = training_lora.build
    monkeypatch.setattr(training_lora, "build", lambda *given: tasks.append(build(*given)) or tasks[0])
    assert teach("run") == 0
    (task,) = tasks
    kept = {name.replace(".base_layer", ""): value for name, value in task.base.network.state_dict().items()}
    assert same_bits(stage_c, {name: kept[name] for name in stage_c.state_dict()})
    state = checkpoint("run")
    names = {name for name, value in task.named_parameters() if value.requires_grad}
    assert len(names) == 2 * 8 and all("lora_" in name for name in names)
    assert state["weights"].keys() == state["averaged"].keys() == state["optimizer"].keys() == names
    assert all(state["weights"][name].any() for name in names)
    assert any(not state["weights"][name].equal(state["averaged"][name]) for name in names)


def test_a_lora_goes_on_as_if_never_stopped(teach):
    assert teach("whole") == 0
    assert teach("parts", steps=2) == 0
    between = load_file("parts/lora.safetensors")
    assert teach("parts") == 0
    whole, parts = load_file("whole/lora.safetensors"), load_file("parts/lora.safetensors")
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)
    assert any(not whole[name].equal(between[name]) for name in whole)
    weights = checkpoint("whole")["weights"], checkpoint("parts")["weights"]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_a_lora_learns_stage_cs_loss_and_is_sampled_with(teach, tiny_folder, emoji, tmp_path):
    """Before its first step it is Stage C's to the bit: it changes nothing yet."""
    from wuerstchen_core.training import stage_c as training_stage_c
    from wuerstchen_core.training.data_options import DataOptions
    from wuerstchen_core.training.draws import Draws

    data = DataOptions(data=str(emoji), size=64, batch=2, workers=0)
    files = {"init": str(tiny_folder / STAGE_C), "text_encoder": str(tiny_folder / SET["text_encoder_c"]),
             "semantic_compressor": str(tiny_folder / SET["semantic_compressor"])}  # fmt: skip
    tasks = [
        training_stage_c.build(training_stage_c.Options(**files), data),
        training_lora.build(training_lora.Options(**files), data),
    ]
    batch = next(data.open(0))
    losses = [task(batch | {"features": task.features(batch)}, Draws(0, 0, 2))["noise"] for task in tasks]
    assert losses[0].equal(losses[1])
    assert tasks[0].feature_files == tasks[1].feature_files and len(tasks[1].frozen) == 2
    assert teach("run", steps=1, sample_every=1, sample_steps=1, prompts='["a disc", "a cat"]') == 0
    assert Image.open("run/samples/0000001.png").size == (2 * 64 + 12, 64 + 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_lora_is_written_in_the_precision_asked_for(teach, dtype):
    assert teach("run", steps=1, dtype=str(dtype).removeprefix("torch.")) == 0
    assert {tensor.dtype for tensor in load_file("run/lora.safetensors").values()} == {dtype}


@pytest.mark.parametrize(
    "options, says",
    [
        ({"init": "none.safetensors"}, "init: there is no none.safetensors"),
        ({"init": ""}, "init is missing"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": '["to_x"]'}, "to_x: there is no such module"),
        ({"network.depth": 3}, "unrecognized arguments: --network.depth"),
        ({"init": "mini"}, "text_encoder: .* gives texts of width 32, but this Stage C reads 192"),
    ],
)
def test_what_a_lora_cannot_be_trained_with_is_named(teach, tmp_path, options, says, capsys):
    try:
        assert teach("run", **options) == 2
    except SystemExit as exit:
        assert exit.code == 2
    assert re.search(says, capsys.readouterr().err.splitlines()[-1]) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["mini", "v2"])
def test_the_shipped_configurations_are_whole(size):
    from wuerstchen_core.training.command import CONFIGS, RunOptions
    from wuerstchen_core.training.data_options import DataOptions
    from wuerstchen_core.training.options import load, read_all
    from wuerstchen_core.training.run import Plan

    path = str(CONFIGS / size / "lora.toml")
    table = load(path)
    _, _, plan, options = read_all((RunOptions, DataOptions, Plan, training_lora.Options), table, path)
    assert options.targets == TARGETS and plan.dtype == "float32" and options.init == table["init"]
    known = {field.name for cls in (RunOptions, DataOptions, Plan, training_lora.Options)
             for field in dataclasses.fields(cls) if field.init}  # fmt: skip
    assert table.keys() == known
