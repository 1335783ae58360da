"""ComfyUI's samplers and schedulers on Stage C and Stage B."""

import pytest
import torch

from tests.comfyui.host import apart, noise
from tests.reference import distance

SAMPLERS = ("euler", "euler_ancestral", "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "uni_pc", "lcm",
            "res_multistep")  # fmt: skip
SCHEDULERS = ("simple", "sgm_uniform", "normal", "beta", "ddim_uniform", "karras")


@pytest.fixture(scope="session")
def stage_b(call, tinies, text, ksampler):
    """KSampler with the tiny set's Stage B, for a latent of Stage C."""

    def sample(latent, **options):
        positive, negative, start = call("WuerstchenStageBConditioning", latent=latent, positive=text("a cat"))
        options = {"cfg": 1.0, "steps": 3, **options}
        return ksampler(start, tinies.model_b, positive, negative, **options)

    return sample


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_with_every_scheduler(ksampler, stage_b, empty, sampler, scheduler):
    options = {"sampler_name": sampler, "scheduler": scheduler}
    latent = ksampler(empty(128, 128), **options)
    assert latent["samples"].isfinite().all() and latent["samples"].std() > 0.05
    if scheduler == "simple":
        assert stage_b(empty(128, 128), **options)["samples"].isfinite().all()


@pytest.mark.parametrize("scheduler", ["simple", "beta", "karras"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_3m_sde", "res_multistep", "uni_pc"])
def test_multistep_samplers_are_finite_at_200_steps(ksampler, empty, sampler, scheduler):
    """ComfyUI's own cosine schedule has steps of no length from about 156 on, by which these would divide."""
    latent = ksampler(empty(128, 128), sampler_name=sampler, scheduler=scheduler, steps=200, cfg=1.0)
    assert latent["samples"].isfinite().all()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_of_the_mini_spread_as_they_should(call, minis, ksampler, empty, sampler, scheduler):
    """Pictures' latents have a standard deviation of about 1.1; noise that is left, or taken twice, changes it."""
    prompt = call("CLIPTextEncode", clip=minis.clip_c, text="red apple, noto style")
    latent = ksampler(empty(), minis.model_c, prompt, prompt, sampler_name=sampler, scheduler=scheduler, steps=20,
                      cfg=1.0)  # fmt: skip
    assert 1.0 < latent["samples"].std() < 1.35


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "res_multistep", "uni_pc"])
def test_deterministic_samplers_agree_at_many_steps(ksampler, empty, sampler):
    reference = ksampler(empty(128, 128), steps=100, cfg=1.0)
    assert apart(ksampler(empty(128, 128), sampler_name=sampler, steps=60, cfg=1.0), reference) < 0.2


def test_the_schedule_is_the_cores(module, tinies):
    from wuerstchen_core.diffusion.schedule import alpha_bar

    sampling = tinies.model_c.get_model_object("model_sampling")
    assert (sampling.sigmas.diff() > 0).all()
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    signal = alpha_bar(t)
    torch.testing.assert_close(sampling.sigma(t), ((1 - signal) / signal).sqrt())
    torch.testing.assert_close(sampling.timestep(sampling.sigma(t)), t)
    ends = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(sampling.network_time(sampling.timestep(sampling.sigma(ends))), ends, atol=1e-6, rtol=0)
    assert float(sampling.sigma_max) == pytest.approx(0.9999**0.5 / 0.01, rel=1e-3)


def test_two_ksamplers_go_the_way_of_one(call, tinies, text, ksampler, empty):
    whole = ksampler(empty(), steps=6)
    shared = {"model": tinies.model_c, "noise_seed": 1, "steps": 6, "cfg": 2.0, "sampler_name": "euler",
              "scheduler": "simple", "positive": text("a cat"), "negative": text("")}  # fmt: skip
    first = call("KSamplerAdvanced", **shared, latent_image=empty(), add_noise="enable", start_at_step=0,
                 end_at_step=3, return_with_leftover_noise="enable")  # fmt: skip
    second = call("KSamplerAdvanced", **shared, latent_image=first, add_noise="disable", start_at_step=3,
                  end_at_step=100, return_with_leftover_noise="disable")  # fmt: skip
    assert apart(first, whole) > 0.1 and apart(second, whole) < 1e-3


def test_guiders(call, tinies, text, ksampler, empty):
    def custom(guider, **options):
        sigmas = call("BasicScheduler", model=tinies.model_c, scheduler="simple", steps=4, denoise=1.0)
        return call("SamplerCustomAdvanced", noise=call("RandomNoise", noise_seed=1), guider=guider, sigmas=sigmas,
                    sampler=call("KSamplerSelect", sampler_name="euler"), latent_image=empty())[0]  # fmt: skip

    cat, nothing, dog = text("a cat"), text(""), text("a dog")
    cfg = custom(call("CFGGuider", model=tinies.model_c, positive=cat, negative=nothing, cfg=2.0))
    assert apart(cfg, ksampler(empty())) < 1e-5
    basic = custom(call("BasicGuider", model=tinies.model_c, conditioning=cat))
    assert apart(basic, ksampler(empty(), cfg=1.0)) < 1e-5
    dual = custom(call("DualCFGGuider", model=tinies.model_c, cond1=cat, cond2=dog, negative=nothing, cfg_conds=2.0,
                       cfg_cond2_negative=1.5, style="regular"))  # fmt: skip
    perpendicular = custom(call("PerpNegGuider", model=tinies.model_c, positive=cat, negative=dog,
                                empty_conditioning=nothing, cfg=2.0, neg_scale=1.0))  # fmt: skip
    for guided in (dual, perpendicular):
        assert guided["samples"].isfinite().all() and 1e-3 < apart(guided, cfg) < 1.5


def test_denoise_keeps_more_of_the_latent_the_less_it_is(ksampler):
    latent = {"samples": noise(1, 16, 6, 6)}
    near, far = (distance(ksampler(latent, steps=8, denoise=denoise, cfg=1.0)["samples"], latent["samples"])
                 for denoise in (0.2, 0.9))  # fmt: skip
    assert near < far


def test_a_shifted_schedule_counts_in_both_kinds_of_sampler(call, run, minis, ksampler, empty):
    shifted = {shift: call("ModelSamplingStableCascade", model=minis.model_c, shift=shift) for shift in (1.0, 2.0)}
    positive, negative = (call("CLIPTextEncode", clip=minis.clip_c, text=prompt) for prompt in ("red apple", ""))

    def theirs(model):
        return ksampler(empty(), model, positive, negative, steps=12)

    def ours(model):
        return run("WuerstchenStageCSampler", model=model, positive=positive, negative=negative, latent=empty(),
                   seed=1, steps=12, cfg=2.0, sampler="ddim", schedule="even", denoise=1.0)  # fmt: skip

    for sample in (theirs, ours):
        plain = sample(minis.model_c)
        assert apart(sample(shifted[1.0]), plain) < 0.01 < 0.02 < apart(sample(shifted[2.0]), plain)
    assert apart(ours(shifted[2.0]), theirs(shifted[2.0])) < 0.02
