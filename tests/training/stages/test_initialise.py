"""The first weights, and dropout, of new Stages B and C."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wuerstchen_core as w
from wuerstchen_core.models.blocks import Attention
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.training.stages.initialise import initialise


def xavier(inputs, outputs, gain=1.0):
    """The standard deviation of Xavier's uniform distribution (Glorot and Bengio 2010, equation 16)."""
    return gain * math.sqrt(2 / (inputs + outputs))


def new(network):
    torch.manual_seed(0)
    for parameter in network.parameters():  # nothing of what the constructor made may stay by accident
        parameter.data.fill_(7.0)
    initialise(network)
    return network


def check(network, expected, left=()):
    """Each weight has the deviation that its name has in `expected`, and is uniform or normal; all biases are zero."""
    for name, parameter in network.named_parameters():
        if any(part in name for part in left):
            assert (parameter == 7).all(), name
            continue
        if name.endswith("bias"):
            assert not parameter.any(), name
            continue
        kind, std = expected(name, parameter)
        values = parameter.detach().flatten()
        if std == 0:
            assert not values.any(), name
            continue
        close = max(0.02, 4 / math.sqrt(len(values)))
        assert values.std().item() == pytest.approx(std, rel=close) and values.mean().abs() < close * std, name
        if kind == "uniform":
            assert values.abs().max() <= std * math.sqrt(3) * (1 + 1e-6), name
        else:
            assert values.abs().max() > std * 2.2, name


def test_stage_c_starts_as_the_released_code_does():
    c, text, depth = 192, 160, 3

    def expected(name, parameter):
        if name.startswith(("projection", "cond_mapper")):
            return "normal", 0.02
        if name.startswith("out") or ".mapper" in name:
            return None, 0
        if "depthwise" in name:
            return "uniform", xavier(9, 9 * c)
        if "channelwise.0" in name:
            return "uniform", xavier(c, 4 * c)
        if "channelwise.4" in name:
            return "uniform", xavier(c, 4 * c) / math.sqrt(depth)
        if "to_out" in name or "kv_mapper" in name:
            return "uniform", xavier(c, c)
        return "uniform", xavier(c, 3 * c)  # queries, keys and values are one matrix there

    check(new(Prior(StageCConfig(width=c, depth=depth, heads=3, text_width=text))), expected, ("gamma", "beta"))


def test_stage_b_starts_as_the_released_code_does():
    widths, text, condition = (32, 64, 128, 128), 96, 112
    blocks = (1, 2, 1, 1)
    config = StageBConfig(widths=widths, heads=(0, 2, 2, 2), blocks=blocks, text_width=text, condition_width=condition)

    def expected(name, parameter):
        if name.startswith(("clip_mapper", "effnet_mappers")):
            return "normal", 0.02
        if name.startswith("clf") or name.endswith(".mapper.weight"):
            return None, 0
        if name.startswith("embedding"):
            return "uniform", xavier(16, widths[0], gain=0.02)
        way, level, block = name.split(".")[:3]
        level = int(level) if way == "down_blocks" else 3 - int(level)
        c = widths[level]
        if "channelwise.4" in name:
            return "uniform", xavier(c, 4 * c) / math.sqrt(5)  # blocks on the way down
        if "channelwise.0" in name or "semantic" in name:
            skip = c if way == "up_blocks" and level < 3 and block == "0" else 0
            return "uniform", xavier(c + skip + (condition if level else 0), 4 * c)
        if "depthwise" in name:
            return "uniform", xavier(9, 9 * c)
        if "to_out" in name:
            return "uniform", xavier(c, c)
        if "attention" in name:
            return "uniform", xavier(c, 3 * c)
        if "kv_mapper" in name:
            return "uniform", xavier(condition, c)
        return "uniform", xavier(4 * widths[level - 1], 4 * c)  # the convolution between levels

    transposed = [f"up_blocks.{i}.{n}.1" for i, n in ((0, 3), (1, 3), (2, 6))]
    check(new(DiffNeXt(config)), expected, ("gamma", "beta", *transposed))


def test_a_new_stage_c_predicts_the_input_itself():
    """Its output is zero at first, so that the noise is x / (1 + 1e-5)."""
    network = Prior(StageCConfig(width=32, depth=2, heads=2, text_width=32)).eval()
    initialise(network)
    x = torch.randn(2, 16, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(network(x, torch.tensor([0.2, 1.0]), torch.randn(2, 7, 32)), x / (1 + 1e-5))


# Dropout


def test_the_released_dropout_is_the_default():
    sizes = {"widths": (16, 32, 32, 32), "heads": (0, 2, 2, 2), "blocks": (1, 1, 1, 1)}
    for network in (Prior(StageCConfig(width=32, depth=1, heads=2, text_width=32)), DiffNeXt(StageBConfig(**sizes))):
        rates = [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
        rates += [module.dropout for module in network.modules() if isinstance(module, Attention)]
        assert len(rates) >= 2 and set(rates) == {0.1}
    assert w.Wuerstchen.mini().stage_c.config.dropout == 0


def test_attention_drops_attention_weights_in_training_alone():
    """With equal keys and values of one, the output is the sum of the weights that are left, each 1 / (n (1 - p))."""
    torch.manual_seed(0)
    attention = Attention(32, 2, dropout=0.3)
    with torch.no_grad():
        for linear in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
            nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
        attention.to_v.bias.fill_(1.0)
        attention.to_out[0].weight.copy_(torch.eye(32))
        tokens = torch.randn(400, 10, 32)
        context = attention.keys_values(torch.randn(400, 10, 32))
        sums = attention.train()(tokens, context)
        assert sums.mean().item() == pytest.approx(1, abs=0.01)
        assert sums.var().item() == pytest.approx(0.3 / (20 * 0.7), rel=0.05)
        assert torch.equal(attention.eval()(tokens, context), attention(tokens, context))
        torch.testing.assert_close(attention(tokens, context), torch.ones(400, 10, 32))


def test_without_training_dropout_changes_no_bit():
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 2, "text_width": 32}
    plain, dropping = Prior(StageCConfig(**sizes, dropout=0.0)).eval(), Prior(StageCConfig(**sizes)).eval()
    dropping.load_state_dict(plain.state_dict())
    x, t, text = torch.randn(2, 16, 3, 4), torch.tensor([0.3, 0.9]), torch.randn(2, 7, 32)
    with torch.no_grad():
        assert torch.equal(plain(x, t, text), dropping(x, t, text))
        assert not torch.equal(plain(x, t, text), dropping.train()(x, t, text))
    assert F.mse_loss(dropping(x, t, text), plain(x, t, text)) > 0
