"""What cannot work says so in one line that names what to use; nothing that a user sets is ignored in silence."""

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.host import noise
from wuerstchen_core import WuerstchenError


def refused(match, function, *arguments, **options):
    with pytest.raises(ValueError, match=match) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert type(caught.value).__name__ == WuerstchenError.__name__
    assert "\n" not in message and len(message) < 500


def test_a_latent_of_another_network(call, run, tinies, ksampler, empty, text):
    positive, negative, start = call("WuerstchenStageBConditioning", latent=empty(), positive=text("a cat"))
    refused("Stage C takes a latent of 16 channels.*Würstchen Empty Latent", ksampler, start)
    refused("Stage B takes a latent of 4 channels", ksampler, empty(), tinies.model_b, positive, negative)
    refused("Stage A takes a latent of 4 channels.*Stage B", call, "VAEDecode", vae=tinies.stage_a, samples=empty())
    refused("Stage A takes a latent of 4 channels", call, "VAEDecodeTiled", vae=tinies.stage_a, samples=empty(),
            tile_size=64, overlap=16)  # fmt: skip
    refused("semantic VAE takes a latent of 16", call, "VAEDecode", vae=tinies.semantic, samples=start)
    refused("Würstchen VQGAN Decode takes a latent of 4", run, "WuerstchenVQGANDecode", vae=tinies.stage_a,
            latent=empty())  # fmt: skip


def test_comfyuis_empty_latents(call, tinies, ksampler, empty, text):
    theirs = call("EmptyLatentImage", width=256, height=256, batch_size=1)
    refused("Würstchen Empty Latent", ksampler, theirs)
    positive, negative, _ = call("WuerstchenStageBConditioning", latent=empty(), positive=text("a cat"))
    refused("does not fit Stage C's.*Würstchen Stage B Conditioning", ksampler, theirs, tinies.model_b, positive,
            negative)  # fmt: skip
    stage_c, _ = call("StableCascade_EmptyLatentImage", width=256, height=256, compression=42, batch_size=1)
    assert ksampler(stage_c)["samples"].shape == (1, 16, 6, 6)


def test_a_network_in_the_wrong_place(call, run, tinies, empty, text):
    options = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler": "ddpm"}
    prompts = {"positive": text("a"), "negative": text("")}
    more = {"schedule": "even", "denoise": 1.0}
    refused("Stage C Sampler is for Würstchen's Stage C, and this is Würstchen's Stage B", run,
            "WuerstchenStageCSampler", model=tinies.model_b, latent=empty(), **prompts, **options, **more)  # fmt: skip
    refused("Stage B Sampler is for Würstchen's Stage B, and this is Würstchen's Stage C", run,
            "WuerstchenStageBSampler", model=tinies.model_c, latent=empty(), **options)  # fmt: skip
    other = type("Patcher", (), {"model": torch.nn.Linear(1, 1)})()
    for node in ("WuerstchenStageCSampler", "WuerstchenScheduler"):
        inputs = {**prompts, **options, **more, "latent": empty()} if "Sampler" in node else {"steps": 2, **more}
        refused(r"another model \(Linear\): take the MODEL from Würstchen Load", run, node, model=other, **inputs)
    refused("takes the semantic VAE, and this is Stage A", run, "WuerstchenSemanticCompress", vae=tinies.stage_a,
            image=torch.rand(1, 64, 64, 3), width=128, height=128)  # fmt: skip
    refused("takes Stage A, and this is the semantic VAE", run, "WuerstchenVQGANEncode", vae=tinies.semantic,
            image=torch.rand(1, 64, 64, 3))  # fmt: skip


def test_text_of_another_encoder(tinies, minis, call, ksampler, empty, text):
    other = call("CLIPTextEncode", clip=minis.clip_c, text="a cat")
    refused("Stage C was trained with a text encoder of width 32.* width 192", ksampler, empty(), positive=other)
    positive, negative, start = call("WuerstchenStageBConditioning", latent=empty(), positive=other)
    refused("Stage B was trained with", ksampler, start, tinies.model_b, positive, negative, cfg=1.0)


def test_a_conditioning_of_stage_b_for_stage_c(tinies, call, ksampler, empty, text):
    positive, _, _ = call("WuerstchenStageBConditioning", latent=empty(), positive=text("a cat"))
    refused("comes from Würstchen Stage B Conditioning.*CLIP Text Encode", ksampler, empty(), positive=positive)


def test_a_control_net(tinies, ksampler, empty, text):
    """Anything that gives a control, as ComfyUI asks for it."""

    class ControlNet:
        extra_hooks = previous_controlnet = None

        def __getattr__(self, name):
            return lambda *inputs, **options: [] if name.startswith("get_") else 0

        def get_control(self, *inputs):
            return {"middle": [None]}

    controlled = [[text("a cat")[0][0], {"control": ControlNet(), "control_apply_to_uncond": True}]]
    refused("there are no ControlNets for Würstchen", ksampler, empty(), positive=controlled)


def test_merges_of_different_networks(call, tinies, minis):
    """Of which ComfyUI would leave out all or nearly all."""
    for one, other in (("model_c", "model_b"), ("model_b", "model_c")):
        models = {"model1": getattr(tinies, one), "model2": getattr(tinies, other)}
        refused("belongs to another network", call, "ModelMergeSimple", **models, ratio=0.5)
        refused("belongs to another network", call, "ModelMergeAdd", **models)
    models = {"model1": minis.model_c, "model2": tinies.model_c}
    refused("Stage C.*belongs to another network", call, "ModelMergeSimple", **models, ratio=0.5)


def test_a_lora_of_another_width(call, tinies, models):
    name = "blocks.2.attention.to_q"
    save_file({f"prior.{name}.lora_A.weight": torch.ones(4, 48), f"prior.{name}.lora_B.weight": torch.ones(48, 4)},
              models / "loras" / "wide.safetensors")  # fmt: skip
    for node, inputs in (("LoraLoaderModelOnly", {"lora_name": "wide.safetensors", "strength_model": 1.0}),
                         ("WuerstchenLoadLoRA", {"file": "wide.safetensors", "strength": 1.0})):  # fmt: skip
        refused(f"another .*{name}|{name}.*another", call, node, model=tinies.model_c, **inputs)


def test_an_image_of_a_few_pixels(call, tinies):
    for vae in (tinies.stage_a, tinies.semantic):
        refused("this image is 64x7 pixels, at least 8x8", call, "VAEEncode", vae=vae, pixels=torch.rand(1, 7, 64, 3))


def test_stage_b_without_a_semantic_latent(tinies, call, ksampler, empty, text):
    _, _, start = call("WuerstchenStageBConditioning", latent=empty())
    refused("put Würstchen Stage B Conditioning", ksampler, start, tinies.model_b, text("a cat"), text(""))


def test_stage_b_goes_without_text(call, tinies, ksampler, empty):
    """And comes through ComfyUI's nodes that take a text for granted."""
    positive, negative, start = call("WuerstchenStageBConditioning", latent=empty())
    zeroed = call("ConditioningZeroOut", conditioning=positive)
    assert ksampler(start, tinies.model_b, zeroed, negative, cfg=2.0)["samples"].isfinite().all()


U_NET_NODES = {
    "FreeU": {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2},
    "FreeU_V2": {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2},
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
    "HyperTile": {"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False},
    "TomePatchModel": {"ratio": 0.3},
    "PatchModelAddDownscale": {"block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35,
                               "downscale_after_skip": True, "downscale_method": "bicubic",
                               "upscale_method": "bicubic"},
    "SkipLayerGuidanceDiT": {"double_layers": "1", "single_layers": "1", "scale": 3.0, "start_percent": 0.0,
                             "end_percent": 1.0, "rescaling_scale": 0.0},
    "UNetSelfAttentionMultiply": {"q": 1.1, "k": 1.0, "v": 1.0, "out": 1.0},
    "UNetCrossAttentionMultiply": {"q": 1.0, "k": 1.0, "v": 1.0, "out": 0.9},
    "UNetTemporalAttentionMultiply": {"self_structural": 1.0, "self_temporal": 1.0, "cross_structural": 1.0,
                                      "cross_temporal": 1.1},
}  # fmt: skip


@pytest.mark.parametrize("node", U_NET_NODES)
def test_nodes_for_other_networks(call, tinies, ksampler, empty, node):
    def run():
        ksampler(empty(), call(node, model=tinies.model_c, **U_NET_NODES[node]))

    refused("take it out", run)


@pytest.mark.parametrize("node", ["ModelSamplingSD3", "ModelSamplingAuraFlow", "ModelSamplingFlux",
                                  "ModelSamplingDiscrete", "ModelSamplingContinuousEDM"])  # fmt: skip
def test_noise_schedules_of_other_models(call, tinies, ksampler, empty, node):
    options = {
        "ModelSamplingSD3": {"shift": 3.0},
        "ModelSamplingAuraFlow": {"shift": 1.7},
        "ModelSamplingFlux": {"max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 1024},
        "ModelSamplingDiscrete": {"sampling": "v_prediction", "zsnr": False},
        "ModelSamplingContinuousEDM": {"sampling": "v_prediction", "sigma_max": 120.0, "sigma_min": 0.002},
    }[node]
    refused("ModelSamplingStableCascade", ksampler, empty(), call(node, model=tinies.model_c, **options))


def test_results_that_are_not_finite(call, tinies, ksampler, text):
    refused("gave values that are not finite", ksampler, {"samples": noise(1, 16, 6, 6) * float("inf")}, denoise=0.5)
    broken = [[text("a cat")[0][0] * float("nan"), {}]]
    refused("not finite: run its text encoder in float32", ksampler, {"samples": noise(1, 16, 6, 6)}, positive=broken)


def test_what_a_script_may_put_on_a_socket(run, tinies, empty, text, minis):
    """Anything at all, and each node says what it takes."""
    prompts, options = (
        {"positive": text("a"), "negative": text("")},
        {"seed": 1, "steps": 2, "cfg": 1.0, "sampler": "ddpm"},
    )
    for wrong in ("x", 0, None, tinies.clip_c, tinies.stage_a.first_stage_model):
        refused("Stage C Sampler is for", run, "WuerstchenStageCSampler", model=wrong, latent=empty(), schedule="even",
                denoise=1.0, **prompts, **options)  # fmt: skip
        refused("Stage B Sampler is for", run, "WuerstchenStageBSampler", model=wrong, latent=empty(), **options)
        refused("takes Stage A", run, "WuerstchenVQGANDecode", vae=wrong, latent=empty())
        refused("takes the semantic VAE", run, "WuerstchenSemanticCompress", vae=wrong, image=torch.rand(1, 64, 64, 3),
                width=128, height=128)  # fmt: skip
    for wrong in ("x", None, {}, {"samples": "x"}, noise(1, 16, 3, 3)):
        refused("takes a latent, not .*: take it from", run, "WuerstchenStageBSampler", model=tinies.model_b,
                latent=wrong, **options)  # fmt: skip
    refused("text: expected a text, got NoneType", run, "WuerstchenTextEncode", clip=tinies.clip_c, text=None)


@pytest.mark.parametrize("side", [120, 130, -8, 4104])
def test_a_size_out_of_range(run, tinies, side):
    refused(f"width is {side}: it must be a multiple of 8 from 128 to 4096", run, "WuerstchenSemanticCompress",
            vae=tinies.semantic, image=torch.rand(1, 64, 64, 3), width=side, height=256)  # fmt: skip
