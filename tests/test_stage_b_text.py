"""Stage B without text, without its own text encoder, and in a precision that is too narrow for it."""

import logging
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import wuerstchen_core as w
from wuerstchen_core import Geometry, WuerstchenError, pipeline
from wuerstchen_core.checkpoints.sets import MINI, SET, find_set
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderConfig
from wuerstchen_core.util.notices import tell_once

SIZE = Geometry(64, 64)


@pytest.fixture
def semantic():
    return torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(1))


def absent(stage_b):
    network = deepcopy(stage_b)
    network.config = replace(stage_b.config, text_absent=True)
    return network


def sample(stage_b, semantic, *texts, **options):
    return pipeline.sample_stage_b(stage_b, semantic, SIZE, *texts, steps=2, **options)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_no_text_is_77_zero_states_unless_it_was_trained_without(tiny, semantic, cfg):
    none = sample(tiny.stage_b, semantic, cfg=cfg)
    zeros = torch.zeros(1, 77, 32)
    torch.testing.assert_close(none, sample(tiny.stage_b, semantic, zeros, zeros, cfg=cfg), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(none, sample(absent(tiny.stage_b), semantic, cfg=cfg), atol=1e-2)


def test_that_it_was_trained_without_text_is_in_its_file(tiny, tmp_path):
    w.save(absent(tiny.stage_b), tmp_path / "b.safetensors")
    assert w.load_stage_b(tmp_path / "b.safetensors").config.text_absent
    assert not tiny.stage_b.config.text_absent
    assert w.load_stage_b(MINI / SET["stage_b"]).config.text_absent


def test_a_negative_alone_counts(tiny, semantic):
    zeros, negative = torch.zeros(1, 77, 32), tiny.text_encoder_c(["a dog"])
    alone = sample(tiny.stage_b, semantic, None, negative, cfg=2.0)
    torch.testing.assert_close(alone, sample(tiny.stage_b, semantic, zeros, negative, cfg=2.0))
    assert not torch.allclose(alone, sample(tiny.stage_b, semantic, cfg=2.0), atol=1e-3)
    for cfg in (1.0, 2.0):
        with pytest.raises(WuerstchenError, match="Stage B .* width 32, .* width 7"):
            sample(tiny.stage_b, semantic, None, torch.zeros(1, 77, 7), cfg=cfg)


def test_a_set_without_stage_bs_text_encoder(tiny, tiny_folder, tmp_path):
    """Stage B gets zero states; where Stage C's encoder has its width, a folder's is taken for both."""
    files = {role: tiny_folder / name for role, name in SET.items() if (tiny_folder / name).exists()}
    model = w.Wuerstchen.from_files(**files)
    assert model.text_encoder_b is None
    drawn = model.generate("a cat", width=64, height=64, steps_c=1, steps_b=2)
    assert torch.equal(drawn, model.generate("a cat", width=64, height=64, steps_c=1, steps_b=2, negative_prompt=""))
    states = tiny.text_encoder_c(["a cat", ""]).split(1)
    latent = pipeline.sample_stage_c(tiny.stage_c, torch.zeros(1, 16, 2, 2), *states, steps=1, cfg=tiny.defaults.cfg)
    expected = pipeline.decode(tiny.stage_a, sample(tiny.stage_b, latent, torch.zeros(1, 77, 32)), SIZE)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert find_set(tiny_folder)["text_encoder_b"] == tiny_folder / SET["text_encoder_c"]

    for name in SET.values():
        if (tiny_folder / name).exists():
            (tmp_path / name).symlink_to(tiny_folder / name)
    (tmp_path / SET["text_encoder_c"]).unlink()
    w.save(TextEncoder(TextEncoderConfig(width=48, layers=1, heads=2)), tmp_path / SET["text_encoder_c"])
    assert "text_encoder_b" not in find_set(tmp_path)
    assert w.Wuerstchen.from_folder(tmp_path).text_encoder_b is None
    given = {"text_encoder_c": tiny_folder / SET["text_encoder_c"]}
    assert find_set(tmp_path, given)["text_encoder_b"] == given["text_encoder_c"]


def test_where_float16_overflows_it_goes_on_in_float32_and_says_so_once(tiny, semantic, caplog):
    wide = deepcopy(tiny.stage_b).requires_grad_(False)
    wide.embedding[1].weight.copy_(60_000 * wide.embedding[1].weight.sign())  # float16 can hold it, its sums not
    half = deepcopy(wide).half()
    weights = {name: parameter for name, parameter in half.named_parameters()}
    text, seen = tiny.text_encoder_c(["a cat"]), []
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        runs = [
            sample(half, semantic, text, dtype=dtype, progress=lambda step, steps, clean: seen.append((step, clean)))
            for dtype in (None, torch.float16)
        ]
    expected = sample(deepcopy(half).float(), semantic, text)
    assert all(torch.equal(run, expected) for run in runs)
    assert [step for step, _ in seen] == [1, 2, 1, 2] and all(clean.isfinite().all() for _, clean in seen)
    assert [record.message for record in caplog.records if "float16" in record.message] == [
        "Stage B overflows in float16: it goes on in float32, slower and with more memory"
    ]
    assert all(parameter is weights[name] for name, parameter in half.named_parameters())


def test_what_is_not_finite_in_float32_either_is_told(tiny, semantic):
    half = deepcopy(tiny.stage_b).half()
    half.embedding[1].weight.data[0] = float("inf")
    with pytest.raises(WuerstchenError, match="^Stage B gave values that are not finite in float32"):
        sample(half, semantic)
