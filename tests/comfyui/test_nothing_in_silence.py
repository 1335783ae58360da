"""What reaches Stage B after Stage C, and cannot be what was meant, is refused."""

import pytest
import torch

from tests.comfyui.host import apart, noise
from tests.comfyui.test_refusals import refused
from tests.nodes.inputs import QUICK_B

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
    latent = {"samples": noise(3, 16, 6, 6)}
    positive, negative, start = call("WuerstchenStageBConditioning", latent=latent)

    def draw(start, positive=positive):
        return ksampler(start, tinies.model_b, positive, negative)

    whole = draw(start)
    for index, length in ((1, 1), (0, 2), (2, 1)):
        part = call("LatentFromBatch", samples=start, batch_index=index, length=length)
        refused(f"holds {length} of the 3 pictures.*before that node", draw, part)
    taken = call("LatentFromBatch", samples=latent, batch_index=1, length=1)
    positive_of_it, _, start_of_it = call("WuerstchenStageBConditioning", latent=taken)
    assert apart(draw(start_of_it, positive_of_it), {"samples": whole["samples"][1:2]}) < 1e-3
    repeated = draw(call("RepeatLatentBatch", samples=start, amount=2))
    assert len(repeated["samples"]) == 6
    assert apart({"samples": repeated["samples"][:3]}, whole) < 1e-3


def test_the_attention_of_text_encoders_is_multiplied(call, tinies, text):
    inputs = {"q": 1.5, "k": 1.0, "v": 1.0, "out": 0.5}
    [[changed, _]] = call("CLIPTextEncode", clip=call("CLIPAttentionMultiply", clip=tinies.clip_c, **inputs), text="a")
    assert (changed - text("a")[0][0]).abs().mean() > 0.01
