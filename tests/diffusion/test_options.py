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
    {"seed": 2**64}, {"seed": -(2**63) - 1}, {"seed": 1.0}, {"seed": True}, {"seed": 10**5000}, {"seed": "x" * 999},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(next(iter(wrong))))
def test_a_wrong_value_is_one_line_that_names_it(wrong):
    (name,) = wrong
    with pytest.raises(WuerstchenError, match=f"^(unknown )?{name} ") as error:
        SamplingOptions(**wrong)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_the_defaults_are_the_released_ones_and_whole_numbers_of_any_type_are_taken():
    assert (STAGE_C.steps, STAGE_C.cfg, STAGE_B.steps, STAGE_B.cfg) == (30, 4.0, 12, 1.0)
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
