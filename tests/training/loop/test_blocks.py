"""Gradient checkpointing and compilation."""

import pytest
import torch
from torch import nn

from wuerstchen_core.models.stage_a import VQGAN, StageAConfig
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.training.loop.blocks import BLOCKS, checkpoint_blocks, compile_blocks


def networks():
    x, t, semantic = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.9]), torch.randn(2, 16, 2, 2)
    config = StageBConfig(
        widths=(16, 32),
        heads=(0, 2),
        blocks=(1, 1),
        semantic=(False, True),
        condition_width=24,
        text_width=20,
        dropout=0.0,
    )
    yield DiffNeXt(config), lambda network: network(x, t, semantic, torch.ones(2, 7, 20))
    yield (
        Prior(StageCConfig(width=32, depth=2, heads=2, text_width=20, dropout=0.0)),
        lambda c: c(semantic, t, torch.ones(2, 7, 20)),
    )
    stage_a = VQGAN(StageAConfig(widths=(8, 16), bottleneck_blocks=1, codebook_size=16))
    yield stage_a, lambda network: network.decode(x)


@pytest.mark.parametrize("index", range(3))
def test_gradient_checkpointing_changes_no_gradient(index, monkeypatch):
    torch.manual_seed(3)
    network, call = list(networks())[index]
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    gradients = []
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    for module in network.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(count)
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_blocks(network)
        network.zero_grad()
        call(network).square().mean().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in network.parameters()])
    assert calls % 3 == 0 and calls > 0  # once, then once more and again for the gradient
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None) == (again is None)
        if plain is not None:
            assert torch.equal(plain, again)


def test_every_block_is_compiled_and_computes_the_same(monkeypatch):
    """By dynamo alone, which needs no compiler of C++."""
    network, call = next(iter(networks()))
    expected = call(network)
    compiled = []
    compile = nn.Module.compile

    def eager(module):
        compiled.append(module)
        compile(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", eager)
    names = list(network.state_dict())
    compile_blocks(network)
    assert compiled == [module for module in network.modules() if isinstance(module, BLOCKS)] and len(compiled) > 3
    torch.testing.assert_close(call(network), expected)
    assert list(network.state_dict()) == names
