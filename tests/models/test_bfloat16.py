"""bfloat16 has 8 bits: what they are summed up in, and the pictures that come of them."""

import copy

import pytest
import torch

import wuerstchen_core as w
from tests.reference import randomise
from wuerstchen_core.mini.evaluation import psnr
from wuerstchen_core.models.blocks import Attention, GlobalResponseNorm, LayerNorm2d
from wuerstchen_core.util.precision import dtype_of

ROUNDING = 2**-9  # half a unit of the last place, relative to a value


@pytest.fixture(scope="module")
def mini():
    return w.Wuerstchen.mini(dtype=torch.float32)


@pytest.fixture(scope="module")
def narrow():
    return w.Wuerstchen.mini(dtype=torch.bfloat16)


def error(module, *given):
    """Relative to float64, of the same weights and values; the norm of the error by that of the result."""
    given = [one.bfloat16() for one in given]
    with torch.no_grad():
        exact = copy.deepcopy(module).bfloat16().double()(*(one.double() for one in given))
        found = module.bfloat16()(*(one.clone() for one in given))
    assert found.dtype == torch.bfloat16
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_layer_norm_sums_up_in_float32():
    """In bfloat16 the variance beside a mean of 20 would be rounding."""
    x = (20 + torch.randn(1, 1536, 3, 3)).contiguous(memory_format=torch.channels_last)
    assert error(LayerNorm2d(), x) < ROUNDING


def test_response_norm_sums_up_in_float32():
    """In bfloat16 the sum of 65,536 squares would stop growing after a few hundred, that of a single one would not."""
    x = torch.rand(1, 256, 256, 8)
    x[..., ::2] = 0
    x[:, 0, 0, ::2] = 256
    assert error(randomise(GlobalResponseNorm(8)), x) < 2 * ROUNDING


class Averaging(torch.nn.Module):
    """Attention that sees all tokens alike: what comes out is their mean, of thousands of values."""

    def __init__(self):
        super().__init__()
        self.attention = randomise(Attention(32, 2))
        self.attention.to_q.weight.data.zero_()
        self.attention.to_q.bias.data.zero_()

    def forward(self, tokens):
        return self.attention(tokens, None)


def test_attention_sums_up_in_float32():
    assert error(Averaging(), 1 + torch.randn(1, 4096, 32) / 8) < 3 * ROUNDING  # of values, their mean and the result


@pytest.mark.parametrize("stage", ["stage_c", "stage_b", "stage_a"])
def test_networks_of_the_mini_are_near_float64(mini, stage):
    """In the precision of noise that a sampler takes from its latent, which stays in float32."""
    draw = torch.Generator().manual_seed(1)
    x, text, semantic = (torch.randn(1, *size, generator=draw) for size in ((4, 32, 32), (77, 192), (16, 3, 3)))
    text, semantic, t = text.bfloat16(), semantic.bfloat16(), torch.tensor([0.7])

    def run(network, dtype, latent):
        if stage == "stage_a":
            return network.decode(x.bfloat16().to(dtype))
        modulation, given = network.modulate(t, dtype), semantic.to(dtype)
        if stage == "stage_c":
            return network.denoise(semantic.to(latent), modulation, network.condition(text.to(dtype)))
        return network.denoise(x.to(latent), modulation, network.condition(given, text.to(dtype), (32, 32)))

    with torch.no_grad():
        network = copy.deepcopy(getattr(mini, stage)).bfloat16()
        found = run(network, torch.bfloat16, torch.float32)
        exact = run(network.double(), torch.float64, torch.float64)
    assert ((found.double() - exact).norm() / exact.norm()).item() < 4 * ROUNDING


def test_text_encoders_stay_in_float32(narrow):
    """bfloat16 would change the states of the prompt below by a half, and those of others by a twentieth."""
    others = {dtype_of(network) for network in (narrow.stage_a, narrow.stage_b, narrow.stage_c)}
    assert others == {torch.bfloat16} == {dtype_of(narrow.semantic_compressor)}
    assert dtype_of(narrow.text_encoder_c) == torch.float32


def test_a_picture_is_the_one_of_float32(mini, narrow):
    prompt = "red apple, noto style, on a blue background"
    pictures = [model.generate(prompt, width=128, height=128) for model in (narrow, mini)]
    assert psnr(*pictures).item() > 40
