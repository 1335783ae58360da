"""What comes out of the nodes in ComfyUI is what comes out of the core; ComfyUI's own samplers come near it."""

from types import SimpleNamespace

import pytest
import torch

from tests.comfyui.host import apart, noise, picture
from tests.pictures import psnr
from tests.reference import distance
from wuerstchen_core import Geometry
from wuerstchen_core.pipeline import compress, decode, encode, fit, preview, sample_stage_b, sample_stage_c

C = {"seed": 3, "steps": 5, "cfg": 3.0, "sampler": "ddpm", "schedule": "even", "denoise": 1.0}
B = {"seed": 3, "steps": 4, "cfg": 1.0, "sampler": "ddpm"}
ROUNDING = 1e-3  # of random networks, which amplify it


@pytest.fixture
def stage_c(run, tinies, text):
    def sample(latent, **options):
        inputs = {"positive": text("a cat"), "negative": text("a dog"), **C, **options}
        return run("WuerstchenStageCSampler", model=tinies.model_c, latent=latent, **inputs)

    return sample


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}, {"cfg": 1.0}, {"schedule": "uneven", "steps": 29},
                                     {"denoise": 0.6}, {"denoise": 0.0}, {"steps": 160}, {"sampler": "dpmpp_2m"},
                                     {"sampler": "dpmpp_2m_sde", "denoise": 0.7}, {"cfg_interval_high": 0.7},
                                     {"cfg_interval_low": 0.5, "cfg_rescale": 0.6}, {"cfg_rescale": 1.0}])  # fmt: skip
def test_stage_c_sampler_is_the_cores(tiny, stage_c, options):
    start = noise(2, 16, 6, 3)
    texts = [tiny.text_encoder_c([prompt]) for prompt in ("a cat", "a dog")]
    core = {**C, **options}
    core["cfg_interval"] = core.pop("cfg_interval_low", 0.0), core.pop("cfg_interval_high", 1.0)
    expected = sample_stage_c(tiny.stage_c, start, *texts, **core)
    assert distance(stage_c({"samples": start}, **options)["samples"], expected) < ROUNDING


def test_a_picture_of_a_batch_is_itself_alone(stage_c, empty):
    whole, one = stage_c(empty(batch_size=3)), stage_c({**empty(), "batch_index": [1]})
    assert distance(one["samples"], whole["samples"][1:2]) < ROUNDING


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}, {"cfg": 2.0}, {"schedule": "even"}])
@pytest.mark.parametrize("with_text", [True, False])
def test_stage_b_sampler_is_the_cores(run, tiny, tinies, text, options, with_text):
    semantic = noise(2, 16, 6, 6)
    options = {**B, **options}
    prompts = {"positive": text("a cat"), "negative": text("a dog")} if with_text else {}
    texts = [tiny.text_encoder_b([prompt]) for prompt in ("a cat", "a dog")] if with_text else []
    ours = run("WuerstchenStageBSampler", model=tinies.model_b, latent={"samples": semantic}, **options, **prompts)
    expected = sample_stage_b(tiny.stage_b, semantic, Geometry(256, 256), *texts, **options)
    scale = tiny.stage_a.config.scale_factor
    assert distance(ours["samples"], expected * scale) < ROUNDING


def test_stage_as_latents_are_raw_and_the_pictures_the_cores(run, call, tiny, tinies):
    image = picture(136, 200, batch=2)
    latent = run("WuerstchenVQGANEncode", vae=tinies.stage_a, image=image)
    scaled = encode(tiny.stage_a, image)
    assert distance(latent["samples"], scaled * tiny.stage_a.config.scale_factor) < ROUNDING
    decoded = run("WuerstchenVQGANDecode", vae=tinies.stage_a, latent=latent)
    assert decoded.shape == image.shape
    torch.testing.assert_close(decoded, decode(tiny.stage_a, scaled, Geometry(200, 136)), atol=1e-5, rtol=1e-4)


def test_the_semantic_vae_is_compressor_and_previewer(run, call, tiny, tinies, mini, minis):
    image = picture(150, 333, batch=2)
    latent = run("WuerstchenSemanticCompress", vae=tinies.semantic, image=image, width=200, height=136)
    expected = compress(tiny.semantic_compressor, fit(image, Geometry(200, 136)))
    assert distance(latent["samples"], expected) < ROUNDING
    encoded = call("VAEEncode", vae=tinies.semantic, pixels=image[:, :136, :200])
    assert distance(encoded["samples"], compress(tiny.semantic_compressor, image[:, :136, :200])) < ROUNDING
    samples = noise(1, 16, 6, 6)
    expected = preview(mini.previewer, samples)
    torch.testing.assert_close(call("VAEDecode", vae=minis.semantic, samples={"samples": samples}), expected)
    shown = run("WuerstchenSemanticPreview", latent={"samples": samples}, vae=minis.semantic)
    torch.testing.assert_close(shown, expected)


def test_a_seed_gives_the_picture_of_the_command_line(run, mini, minis):
    """The whole way on the mini, against `generate`."""
    text = run("WuerstchenTextEncode", clip=minis.clip_c, text="fox in fluent style")
    nothing = run("WuerstchenTextEncode", clip=minis.clip_c, text="")
    latent = run("WuerstchenEmptyLatent", width=344, height=200, batch_size=1)
    options = {"sampler": "dpmpp_2m_sde", "cfg_rescale": 0.5}
    latent = run("WuerstchenStageCSampler", model=minis.model_c, positive=text, negative=nothing, latent=latent,
                 **{**C, **options, "steps": 8, "cfg_interval_high": 0.9})  # fmt: skip
    latent = run("WuerstchenStageBSampler", model=minis.model_b, positive=text, latent=latent,
                 **{**B, "sampler": "dpmpp_2m_sde"})  # fmt: skip
    image = run("WuerstchenVQGANDecode", vae=minis.stage_a, latent=latent)
    expected = mini.generate("fox in fluent style", width=344, height=200, seed=3, steps_c=8, cfg_c=3.0, steps_b=4,
                             cfg_interval=(0.0, 0.9), **options)  # fmt: skip
    assert image.shape == expected.shape == (1, 200, 344, 3)
    assert psnr(image, expected) > 80


@pytest.mark.parametrize("theirs, ours", [("euler", "ddim"), ("dpmpp_2m", "dpmpp_2m")])
def test_ksamplers_deterministic_samplers_are_the_cores(stage_c, ksampler, text, empty, theirs, ours):
    ours = stage_c(empty(), sampler=ours, steps=30)
    theirs = ksampler(empty(), sampler_name=theirs, negative=text("a dog"), seed=3, steps=30, cfg=3.0)
    assert apart(theirs, ours) < 0.01


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "dpmpp_2m", "euler"])
def test_the_cores_samplers_are_comfyuis_given_the_same_noise(tinies, name):
    from comfy.k_diffusion import sampling

    from tests.reference import predictor, signal
    from wuerstchen_core.diffusion.samplers import SAMPLERS
    from wuerstchen_core.diffusion.schedule import sampling_times

    times = sampling_times(9, "uneven")
    sigmas = torch.tensor([*(((1 - signal(t)) / signal(t)) ** 0.5 for t in times[:-1]), 0.0], dtype=torch.float64)
    start, *drawn = (noise(1, 4, 3, 3, seed=seed).double() for seed in range(10))

    def denoiser(x, sigma, **extra):
        t = times[(sigmas - sigma.flatten()[0]).abs().argmin()]
        return x - sigma.view(-1, 1, 1, 1) * predictor(x * signal(t) ** 0.5, t)

    denoiser.inner_model = SimpleNamespace(model_patcher=tinies.model_c)  # some look up the kind of its schedule there
    draws, again = iter(drawn), iter(drawn)
    more = {"noise_sampler": lambda *_: next(draws)} if name in ("ddpm", "dpmpp_2m_sde") else {}
    theirs = getattr(sampling, f"sample_{name}")(denoiser, start / signal(1) ** 0.5, sigmas, disable=True, **more)
    sampler = SAMPLERS["ddim" if name == "euler" else name]
    ours = sampler(predictor, start, times, lambda: next(again), lambda state: None)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_scheduler_gives_the_cores_times(run, call, tinies, text, stage_c, empty):
    sigmas = run("WuerstchenScheduler", model=tinies.model_c, schedule="uneven", steps=29, denoise=1.0)
    assert len(sigmas) == 30 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    # 1 - alpha_bar over alpha_bar of the cosine schedule, at its clamped start and at t = 2/3 behind 19 steps
    s, t = 0.008, 2 / 3
    angle = lambda t: torch.tensor((t + s) / (1 + s) * torch.pi / 2, dtype=torch.float64)  # noqa: E731
    signal = (angle(t).cos() / angle(0).cos()) ** 2
    torch.testing.assert_close(sigmas[19].double(), ((1 - signal) / signal).sqrt(), rtol=1e-5, atol=0)
    assert sigmas[0] == pytest.approx((0.9999 / 0.0001) ** 0.5, rel=1e-4)
    guider = call("CFGGuider", model=tinies.model_c, positive=text("a cat"), negative=text("a dog"), cfg=3.0)
    _, clean = call(
        "SamplerCustomAdvanced",
        noise=call("RandomNoise", noise_seed=3),
        guider=guider,
        sampler=call("KSamplerSelect", sampler_name="euler"),
        sigmas=sigmas,
        latent_image=empty(),
    )
    assert apart(clean, stage_c(empty(), sampler="ddim", schedule="uneven", steps=29)) < 0.05
