"""What a set draws best with, where nobody asks for anything else."""

import pytest
import torch

import wuerstchen_core as w
from wuerstchen_core.checkpoints.sets import MINI, SET
from wuerstchen_core.diffusion.options import SamplingOptions
from wuerstchen_core.models.defaults import Defaults, defaults_of
from wuerstchen_core.models.semantic_compressor import SemanticCompressorConfig
from wuerstchen_core.models.stage_c import StageCConfig


@pytest.mark.parametrize(
    "config",
    [
        StageCConfig(),  # v2
        StageCConfig(width=1280, depth=16, heads=16, text_width=1024),  # v1
        SemanticCompressorConfig(),
    ],
)
def test_released_networks_draw_1024_pixels_a_side(config):
    few = SamplingOptions(steps=5, cfg=1.0, sampler="dpmpp_2m_sde", schedule="uneven")
    assert defaults_of(config) == Defaults(side=1024, cfg=4.0, few_steps_b=few)


def test_the_minis_networks_draw_256():
    stage_c = w.load_stage_c(MINI / SET["stage_c"])
    compressor = w.load_semantic_compressor(MINI / SET["semantic_compressor"])
    few = SamplingOptions(steps=3, cfg=1.0, sampler="lcm", schedule="even")
    assert {defaults_of(network.config) for network in (stage_c, compressor)} == {Defaults(256, 2.0, few_steps_b=few)}


def test_generate_takes_the_sets_own_size_and_guidance(tiny, monkeypatch):
    few = {"seed": 3, "steps_c": 2, "steps_b": 1}
    own = tiny.generate("a cat", **few)
    assert torch.equal(own, tiny.generate("a cat", **few, width=256, height=256, cfg_c=2.0))
    assert not torch.equal(own, tiny.generate("a cat", **few, cfg_c=4.0))
    monkeypatch.setattr("wuerstchen_core.pipeline.defaults_of", lambda config: Defaults(side=128, cfg=3.0))
    assert torch.equal(
        tiny.generate("a cat", **few, height=192),
        tiny.generate("a cat", **few, width=128, height=192, cfg_c=3.0),
    )


def test_stage_b_may_have_a_seed_of_its_own(tiny):
    few = {"steps_c": 2, "steps_b": 2}
    same, other = tiny.generate("a cat", seed=3, **few), tiny.generate("a cat", seed=3, seed_b=4, **few)
    assert torch.equal(same, tiny.generate("a cat", seed=3, seed_b=3, **few))
    assert not torch.equal(same, other) and not torch.equal(other, tiny.generate("a cat", seed=4, **few))
    with pytest.raises(w.WuerstchenError, match="seed_b is 'x'"):
        tiny.generate("a cat", seed_b="x", **few)
