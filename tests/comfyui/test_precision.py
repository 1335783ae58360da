"""Precisions that ComfyUI's options set, and float16 where it is too narrow."""

import logging

import pytest
import torch

from tests.comfyui.host import apart, load_set, noise
from tests.nodes.inputs import QUICK_B
from tests.reference import distance

NOTE = "Stage B overflows in float16: it goes on in float32, slower and with more memory"


@pytest.fixture
def narrow(run, monkeypatch):
    """The tiny set as on a GPU that computes in float16, with a Stage B whose values go beyond it."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "unet_manual_cast", lambda *inputs, **options: None)
    narrow = load_set(run, "tiny", "fp16")
    with torch.no_grad():
        weight = narrow.model_b.model.diffusion_model.embedding[1].weight
        weight.data.copy_(60_000 * weight.sign())  # float16 can hold it, its sums not
    return narrow


@pytest.fixture
def notes(module, caplog):
    module("wuerstchen_core.util.notices").tell_once.cache_clear()
    caplog.set_level(logging.WARNING, "wuerstchen_core")
    return lambda: [record.getMessage() for record in caplog.records].count(NOTE)


def test_where_float16_overflows_stage_b_goes_on_in_float32(call, run, narrow, ksampler, empty, notes):
    latent = {**empty(), "samples": noise(1, 16, 6, 6)}
    positive, negative, start = call("WuerstchenStageBConditioning", latent=latent)
    model = narrow.model_b
    weights = {name: weight.clone() for name, weight in model.model.diffusion_model.state_dict().items()}

    def with_ksampler(model, sampler):
        return ksampler(start, model, positive, negative, sampler_name=sampler, cfg=2.0)

    def with_ours(model, sampler):
        return run("WuerstchenStageBSampler", model=model, latent=latent, **{**QUICK_B, "sampler": sampler})

    for sample, sampler in ((with_ksampler, "euler"), (with_ksampler, "ddpm"), (with_ours, "ddpm")):
        drawn = sample(model, sampler)
        expected = sample(call("ModelComputeDtype", model=model, dtype="fp32"), sampler)
        assert drawn["samples"].isfinite().all() and apart(drawn, expected) < 1e-6
    assert notes() == 1
    kept = model.model.diffusion_model.state_dict()
    assert {weight.dtype for weight in kept.values()} == {torch.float16}
    assert all(torch.equal(weight, weights[name]) for name, weight in kept.items())


def test_where_float16_is_wide_enough_it_stays(call, narrow, ksampler, empty, notes):
    drawn = ksampler(empty(), narrow.model_c)
    exact = ksampler(empty(), call("ModelComputeDtype", model=narrow.model_c, dtype="fp32"))
    assert 1e-5 < apart(drawn, exact) < 0.05 and notes() == 0


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_text_encoders_follow_comfyuis_options(call, run, monkeypatch, name):
    from comfy.cli_args import args

    for other in ("fp32", "bf16", "fp16"):
        monkeypatch.setattr(args, f"{other}_text_enc", other == name)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    loaded = load_set(run, "tiny")
    exact = load_exact(run, monkeypatch)
    for clip in (loaded.clip_c, loaded.clip_b):
        assert clip.cond_stage_model.dtypes == {dtype}
    ours, theirs = (call("CLIPTextEncode", clip=clip, text="a cat")[0][0] for clip in (loaded.clip_c, exact.clip_c))
    error = distance(ours, theirs)
    assert error == 0 if name == "fp32" else 1e-5 < error < 0.05


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_stage_a_follows_comfyuis_options(call, run, monkeypatch, name):
    from comfy.cli_args import args

    for other in ("fp32", "bf16", "fp16"):
        monkeypatch.setattr(args, f"{other}_vae", other == name)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    stage_a = load_set(run, "tiny").stage_a
    assert {weight.dtype for weight in stage_a.first_stage_model.parameters()} == {dtype}
    latent = {"samples": noise(1, 4, 16, 16)}
    exact = load_exact(run, monkeypatch).stage_a
    error = distance(call("VAEDecode", vae=stage_a, samples=latent), call("VAEDecode", vae=exact, samples=latent))
    assert error == 0 if name == "fp32" else 1e-5 < error < 0.05


def load_exact(run, monkeypatch):
    """The tiny set in float32."""
    from comfy.cli_args import args

    for option in ("text_enc", "vae"):
        for name in ("fp32", "bf16", "fp16"):
            monkeypatch.setattr(args, f"{name}_{option}", name == "fp32")
    return load_set(run, "tiny")
