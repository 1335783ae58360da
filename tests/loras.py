"""LoRAs of the tiny set's Stage C, ours and diffusers'; a conftest takes the fixtures its folder needs."""

import contextlib
import json
import shutil

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior
from peft import LoraConfig
from safetensors.torch import save_file

import wuerstchen_core as w
from wuerstchen_core.checkpoints.sets import DISTILLED, SET
from wuerstchen_core.training.stages.lora import TARGETS, add_lora, save_lora

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


def adapter(prior, folder):
    prior.save_lora_adapter(folder, adapter_name="default")
    return folder / "pytorch_lora_weights.safetensors"


PAIR = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}


def pair(module="blocks.2.attention.to_q", **changed):
    return {f"{module}.{half}.weight": tensor for half, tensor in (PAIR | changed).items()}


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


def distilled_set(tiny_folder, folder):
    """The tiny set with a LoRA for each stage, which changes it visibly: Stage C draws in 3 steps, Stage B in 2."""
    shutil.copytree(tiny_folder, folder)
    for stage, steps in (("stage_c", 3), ("stage_b", 2)):
        network = getattr(w, f"load_{stage}")(folder / SET[stage])
        torch.manual_seed(0)
        for parameter in add_lora(network, 2, 2.0, None):
            torch.nn.init.normal_(parameter, std=0.2)
        save_lora(network, folder / DISTILLED[stage], sampling={"steps": steps, "cfg": 1.0, "sampler": "lcm"})
    return folder
