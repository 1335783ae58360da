"""One dataclass of options checks what the command line, `generate` and the samplers are given."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from wuerstchen_core import Geometry, WuerstchenError, pipeline
from wuerstchen_core.diffusion.options import STAGE_B, STAGE_C, SamplingOptions

WRONG = [
    {"steps": 0}, {"steps": 10**12}, {"steps": 2**63}, {"steps": 3.0}, {"steps": True}, {"steps": "3"},
    {"cfg": float("nan")}, {"cfg": float("inf")}, {"cfg": 1e300}, {"cfg": 10**400}, {"cfg": "4"}, {"cfg": True},
    {"sampler": "euler"}, {"sampler": None}, {"sampler": ["ddpm"]}, {"schedule": "karras"}, {"schedule": 1},
    {"denoise": -0.1}, {"denoise": 1.1}, {"denoise": float("nan")}, {"denoise": None},
    {"cfg_interval": 0.5}, {"cfg_interval": (0.5,)}, {"cfg_interval": (0.9, 0.1)}, {"cfg_interval": (0, 1.1)},
    {"cfg_interval": (float("nan"), 1)}, {"cfg_interval": "01"}, {"cfg_interval": None}, {"cfg_rescale": 1.1},
    {"cfg_rescale": -0.1}, {"cfg_rescale": True}, {"cfg_rescale": float("nan")},
    {"seed": 2**64}, {"seed": -(2**63) - 1}, {"seed": 1.0}, {"seed": True}, {"seed": 10**5000}, {"seed": "x" * 999},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(next(iter(wrong))))
def test_a_wrong_value_is_one_line_that_names_it(wrong):
    (name,) = wrong
    with pytest.raises(WuerstchenError, match=f"^(unknown )?{name} ") as error:
        SamplingOptions(**wrong)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_the_defaults_are_the_documented_ones_and_whole_numbers_of_any_type_are_taken():
    assert (STAGE_C.steps, STAGE_C.cfg, STAGE_C.sampler, STAGE_C.schedule) == (12, 4.0, "dpmpp_2m_sde", "even")
    assert (STAGE_B.steps, STAGE_B.cfg, STAGE_B.sampler, STAGE_B.schedule) == (5, 1.0, "dpmpp_2m_sde", "uneven")
    for stage in (STAGE_C, STAGE_B):
        assert (stage.cfg_interval, stage.cfg_rescale, stage.denoise) == ((0.0, 1.0), 0.0, 1.0)
    SamplingOptions(steps=np.int64(3), seed=np.uint64(2**64 - 1), cfg=np.float32(2), denoise=0)


def test_the_samplers_take_options_whole_or_by_name(tiny):
    latent, text = torch.zeros(1, 16, 3, 3), tiny.text_encoder_c(["a cat"])
    options = SamplingOptions(steps=2, cfg=1.0, sampler="ddim", seed=4)
    whole = pipeline.sample_stage_c(tiny.stage_c, latent, text, None, options)
    named = pipeline.sample_stage_c(tiny.stage_c, latent, text, steps=2, cfg=1.0, sampler="ddim", seed=4)
    changed = pipeline.sample_stage_c(tiny.stage_c, latent, text, None, options, seed=5)
    assert torch.equal(whole, named) and not torch.equal(whole, changed)
    with pytest.raises(WuerstchenError, match="steps is 0"):
        pipeline.sample_stage_b(tiny.stage_b, torch.zeros(1, 16, 3, 3), Geometry(128, 128), steps=0)


def test_guidance_options_are_the_formulas_along_the_run(tiny):
    """Of one step, at time 1: the steps of a run without guidance, with it, and with it rescaled."""
    latent, texts = torch.zeros(2, 16, 3, 3), [tiny.text_encoder_c([text]) for text in ("a cat", "a dog")]

    def draw(**options):
        return pipeline.sample_stage_c(tiny.stage_c, latent, *texts, **{"steps": 1, "cfg": 3.0, **options})

    plain, other = (draw(cfg=cfg) for cfg in (1.0, 0.0))
    guided = other + 3 * (plain - other)
    torch.testing.assert_close(draw(), guided, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(draw(cfg_interval=(0, 0.9)), plain)
    assert torch.equal(draw(cfg_interval=(1, 1)), draw())
    for picture, wanted, contrast in zip(draw(cfg_rescale=0.5), draw(), plain, strict=True):
        factor = 0.5 + 0.5 * contrast.std() / wanted.std()
        torch.testing.assert_close(picture, factor * wanted, rtol=1e-3, atol=1e-2)


def test_without_guidance_the_negative_is_not_computed(tiny):
    sizes, denoise = [], tiny.stage_c.denoise

    def counted(x, *more):
        sizes.append(len(x))
        return denoise(x, *more)

    tiny.stage_c.denoise = counted
    try:
        tiny.generate("a cat", width=64, height=64, steps_c=4, steps_b=1, cfg_interval=(0.3, 0.75))
    finally:
        del tiny.stage_c.denoise
    assert sizes == [1, 2, 2, 1]  # at the times 1, 0.75, 0.5 and 0.25


@pytest.mark.parametrize("side", ["256", 256.0, True, None, 10**12, 2**63, float("nan"), 7, -8])
def test_a_side_is_a_whole_number(side):
    with pytest.raises(WuerstchenError, match="^width is .*: it must be a multiple of 8 from 8 to 8192$"):
        Geometry(side, 256)


def test_numbers_of_any_type_are_those_numbers(tiny):
    def draw(**options):
        return tiny.generate("a cat", width=64, height=64, steps_b=1, **options)

    plain = draw(steps_c=2, cfg_c=1.5, seed=7)
    several = (
        {"steps_c": np.int64(2), "cfg_c": Fraction(3, 2), "seed": torch.tensor(7)},
        {"steps_c": torch.tensor(2), "cfg_c": np.float16(1.5), "seed": np.uint64(7)},
        {"steps_c": np.uint8(2), "cfg_c": np.float64(1.5), "seed": np.int32(7), "cfg_b": Fraction(1)},
    )
    for options in several:
        assert torch.equal(draw(**options), plain), options
