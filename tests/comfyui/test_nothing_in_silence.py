"""What reaches Stage B after Stage C, and cannot be what was meant, is refused."""

import pytest
import torch

from tests.comfyui.host import noise
from tests.comfyui.test_refusals import refused
from tests.nodes.inputs import QUICK_B
from tests.reference import distance

NOT_FOLLOWED = "noise mask that no sampler with Stage C has followed.*set the mask before Stage C's sampler"


def mask_of(columns, width=256):
    mask = torch.zeros(1, 256, width)
    mask[..., columns:] = 1
    return mask


def masked(call, latent, columns):
    return call("SetLatentNoiseMask", samples=latent, mask=mask_of(columns))


@pytest.fixture
def to_stage_b(call, run, tinies):
    """What each of the two nodes that pass Stage C's latent on does with one."""
    return {
        "conditioning": lambda latent: call("WuerstchenStageBConditioning", latent=latent),
        "sampler": lambda latent: run("WuerstchenStageBSampler", model=tinies.model_b, latent=latent, **QUICK_B),
    }


@pytest.mark.parametrize("node", ["conditioning", "sampler"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_mask_that_stage_c_followed_goes_no_further(call, stage_c, ksampler, to_stage_b, node, ours):
    start = {"samples": noise(2, 16, 6, 6)}
    sample = stage_c if ours else ksampler
    drawn = sample(masked(call, start, 100))
    taken = call("LatentFromBatch", samples=drawn, batch_index=1, length=1)
    enlarged = call("LatentUpscaleBy", samples=drawn, upscale_method="bilinear", scale_by=1.5)
    for latent in (drawn, taken, *([] if ours else [enlarged])):
        to_stage_b[node](latent)
    refused(NOT_FOLLOWED, to_stage_b[node], masked(call, drawn, 60))
    refused(NOT_FOLLOWED, to_stage_b[node], masked(call, taken, 60))


@pytest.mark.parametrize("node", ["conditioning", "sampler"])
def test_a_mask_that_is_set_after_stage_c_is_refused(call, ksampler, to_stage_b, node):
    start = {"samples": noise(1, 16, 6, 6)}
    ksampler(masked(call, start, 128))  # which some other picture has followed
    drawn = ksampler(start)
    refused(NOT_FOLLOWED, to_stage_b[node], masked(call, drawn, 128))
    refused(NOT_FOLLOWED, to_stage_b[node], masked(call, {"samples": noise(1, 16, 6, 6, seed=8)}, 77))
    to_stage_b[node](masked(call, drawn, 0))  # it covers everything


def test_a_mask_on_stage_bs_own_latent_is_followed(call, run, tinies, ksampler):
    picture = noise(1, 4, 64, 64)
    positive, negative, _ = call("WuerstchenStageBConditioning", latent={"samples": noise(1, 16, 6, 6)})
    drawn = ksampler(masked(call, {"samples": picture}, 128), tinies.model_b, positive, negative)["samples"]
    change = (drawn - picture).abs().mean(dim=(0, 1, 2))
    assert change[:30].max() < 1e-5 and change[34:].min() > 0.01


def test_pictures_of_stage_bs_batch_keep_their_semantic_latents(call, tinies, ksampler):
    """Taken out, repeated, put into another order or rebatched, by what they draw when they come alone."""
    latent = {"samples": noise(3, 16, 6, 6)}
    positive, negative, start = call("WuerstchenStageBConditioning", latent=latent)

    def draw(start, positive=positive, **options):
        return ksampler(start, tinies.model_b, positive, negative, **options)["samples"]

    def alone(index, noise_of):
        """Picture `index`, from the noise that the picture `noise_of` of a batch has."""
        taken = {"samples": latent["samples"][index : index + 1]}
        positive, _, start = call("WuerstchenStageBConditioning", latent=taken)
        return draw({**start, "batch_index": [noise_of]}, positive)

    def part(index, length):
        return call("LatentFromBatch", samples=start, batch_index=index, length=length)

    cases = [(start, [(0, 0), (1, 1), (2, 2)]), (part(1, 1), [(1, 1)]), (part(1, 2), [(1, 1), (2, 2)])]
    cases += [(call("RepeatLatentBatch", samples=start, amount=2), [(i % 3, i) for i in range(6)])]
    cases += [(call("RepeatLatentBatch", samples=part(1, 1), amount=3), [(1, 1), (1, 2), (1, 3)])]
    cases += [(call("LatentBatch", samples1=part(2, 1), samples2=part(0, 1)), [(2, 2), (0, 0)])]
    cases += [(each, pairs) for each, pairs in zip(call("RebatchLatents", latents=[start], batch_size=[2])[0:2],
                                                   ([(0, 0), (1, 1)], [(2, 2)]), strict=True)]  # fmt: skip
    for given, pairs in cases:
        drawn = draw(given)
        assert len(drawn) == len(pairs)
        for picture, (index, noise_of) in zip(drawn, pairs, strict=True):
            assert distance(picture, alone(index, noise_of)[0]) < 1e-3


def test_the_numbers_of_pictures_do_not_show(call, tinies, ksampler):
    """From an empty latent without them Stage B draws the same, to the bit."""
    positive, negative, start = call("WuerstchenStageBConditioning", latent={"samples": noise(3, 16, 6, 6)})
    for options in ({}, {"denoise": 0.5}, {"sampler_name": "dpmpp_2m_sde", "scheduler": "karras"}):
        numbered, bare = (
            ksampler(each, tinies.model_b, positive, negative, **options)["samples"]
            for each in (start, {"samples": torch.zeros_like(start["samples"])})
        )
        assert torch.equal(numbered, bare)


def test_pictures_of_another_batch_are_refused(call, tinies, ksampler):
    positive, negative, _ = call("WuerstchenStageBConditioning", latent={"samples": noise(2, 16, 6, 6)})
    *_, larger = call("WuerstchenStageBConditioning", latent={"samples": noise(4, 16, 6, 6)})

    def draw(start):
        return ksampler(start, tinies.model_b, positive, negative)

    refused("picture 4 of another batch than its conditioning, which has 2.*the same", draw, larger)
    refused("holds 3 pictures, and .* was given 2", draw, {"samples": noise(3, 4, 64, 64)})
    assert draw({"samples": noise(4, 4, 64, 64)})["samples"].isfinite().all()


@pytest.mark.parametrize(
    ("key", "node"),
    [("unclip_conditioning", "unCLIPConditioning"), ("reference_latents", "ReferenceLatent"),
     ("guidance", "FluxGuidance"), ("stable_cascade_prior", "use Würstchen Stage B Conditioning")],
)  # fmt: skip
def test_conditionings_for_other_models(call, tinies, text, ksampler, empty, key, node):
    [[states, more]] = text("a cat")
    other = [[states, {**more, key: [noise(1, 16, 6, 6)]}]]
    refused(f"{node}.*", ksampler, empty(), positive=other)
    positive, negative, start = call("WuerstchenStageBConditioning", latent=empty(), positive=other)
    refused(f"{node}.*", ksampler, start, tinies.model_b, positive, negative)


@pytest.mark.parametrize("stage", ["c", "b"])
def test_inpaint_model_conditioning_is_its_noise_mask(call, tinies, text, ksampler, stage):
    """And without it there is nothing that would follow the mask."""
    image, prompts = torch.rand(1, 256, 256, 3), {"positive": text("a cat"), "negative": text("")}
    if stage == "b":
        semantic = call("VAEEncode", pixels=image, vae=tinies.semantic)
        *both, _ = call("WuerstchenStageBConditioning", latent=semantic, **prompts)
        prompts = dict(zip(prompts, both, strict=True))
    model, vae = (tinies.model_c, tinies.semantic) if stage == "c" else (tinies.model_b, tinies.stage_a)

    def draw(noise_mask):
        positive, negative, latent = call("InpaintModelConditioning", **prompts, pixels=image, vae=vae,
                                          mask=mask_of(128)[:, :256], noise_mask=noise_mask)  # fmt: skip
        return ksampler(latent, model, positive, negative), latent

    drawn, latent = draw(True)
    change = (drawn["samples"] - latent["samples"]).abs().mean(dim=(0, 1, 2))
    assert change[: len(change) // 3].max() < 1e-5 < 1e-2 < change[-len(change) // 3 :].min()
    refused("InpaintModelConditioning without noise_mask", draw, False)


def test_the_attention_of_text_encoders_is_multiplied(call, tinies, text):
    inputs = {"q": 1.5, "k": 1.0, "v": 1.0, "out": 0.5}
    [[changed, _]] = call("CLIPTextEncode", clip=call("CLIPAttentionMultiply", clip=tinies.clip_c, **inputs), text="a")
    assert (changed - text("a")[0][0]).abs().mean() > 0.01
