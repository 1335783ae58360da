"""Loading: its memory, what it initialises, and weights that no precision holds."""

import os

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt, WuerstchenPrior
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel

import wuerstchen_core as w
from tests.checkpoints.published import LOADERS, as_published, prior, write
from wuerstchen_core.reports.memory import peak_growth


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize(
    "kind, suffix",
    [
        ("stage_b", ".safetensors"),
        ("stage_b", ".pt"),
        ("stage_c", ".safetensors"),
        ("text_encoder", ".safetensors"),
        ("text_encoder", ".pt"),
    ],
)
def test_loading_takes_the_memory_of_the_file(tmp_path, kind, suffix):
    build = {
        "stage_b": lambda: WuerstchenDiffNeXt(
            c_hidden=[64, 128, 256, 256], nhead=[-1, 2, 4, 4], blocks=[2, 2, 6, 2], c_cond=512, clip_embd=256
        ),
        "stage_c": lambda: as_published(WuerstchenPrior(c=384, c_cond=256, depth=12, nhead=6)),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8, hidden_act="gelu"
            )
        ),
    }[kind]
    path = write(build().state_dict(), tmp_path / f"large{suffix}")
    LOADERS[kind](path)  # what the first load brings with it, such as modules
    grown, network = peak_growth(lambda: LOADERS[kind](path))
    assert grown < 1.15 * path.stat().st_size
    del network


class Written(TorchDispatchMode):
    """Collects what is filled in place outside of the meta device, as initialisation does; `set_` is a file's view."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name.endswith("_") and name != "set_" and isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.operations.append(name)
        return result


def test_nothing_is_initialised_that_is_then_overwritten(layout, tmp_path):
    kind, theirs, wrap = layout
    path = write(wrap(theirs.state_dict()), tmp_path / "weights.safetensors")
    with Written() as written:
        LOADERS[kind](path)
    assert written.operations == []
    with Written() as written:
        nn.Linear(2, 2)
    assert "uniform_" in written.operations  # as it would have been


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, suffix, value):
    weights = prior(published=True).state_dict()
    weights["blocks.2.attention.attn.in_proj_weight"][200, 3] = value  # of to_k
    path = write(weights, tmp_path / f"c{suffix}")
    with pytest.raises(w.WuerstchenError, match="damaged weights, blocks.2.attention.to_k.weight is not finite"):
        w.load_stage_c(path)


def test_weights_beyond_float16_are_named(tmp_path):
    weights = prior().state_dict()
    weights["projection.bias"][3] = 1e5
    path = write(weights, tmp_path / "c.safetensors")
    w.load_stage_c(path, dtype=torch.bfloat16)
    with pytest.raises(w.WuerstchenError, match="projection.bias is too large for float16; .*bfloat16"):
        w.load_stage_c(path, dtype=torch.float16)
