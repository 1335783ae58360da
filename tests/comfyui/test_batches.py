"""Latents: batches, seeds, ComfyUI's own nodes in between, masks, and those of the wrong stage."""

import pytest
import torch

from tests.nodes.inputs import QUICK_C, noise, picture
from wuerstchen_core.pipeline import sample_stage_c


def test_a_batch_is_of_different_pictures(empty, stage_c, stage_b):
    latent = stage_c(empty(batch_size=3))
    for samples in (
        latent["samples"],
        stage_b({**latent, "samples": latent["samples"][:1].repeat(3, 1, 1, 1)})["samples"],
    ):
        assert len(samples) == 3
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert not torch.allclose(samples[one], samples[other])


def test_a_seed_repeats_and_another_does_not(empty, stage_c, stage_b):
    first, again, other = (stage_c(empty(), seed=seed)["samples"] for seed in (1, 1, 2))
    assert first.equal(again) and not torch.allclose(first, other)
    first, again, other = (stage_b(empty(), seed=seed)["samples"] for seed in (1, 1, 2))
    assert first.equal(again) and not torch.allclose(first, other)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m_sde"])
def test_a_picture_taken_out_of_a_batch_stays_itself(empty, stage_c, stage_b, sampler):
    whole, taken = empty(batch_size=3), {**empty(), "batch_index": [1]}  # as LatentFromBatch gives it
    batch, one = stage_c(whole, sampler=sampler), stage_c(taken, sampler=sampler)
    fine_batch, fine_one = stage_b(batch, sampler=sampler), stage_b(one, sampler=sampler)
    for alone, within in ((one, batch), (fine_one, fine_batch)):
        torch.testing.assert_close(alone["samples"][0], within["samples"][1], rtol=1e-3, atol=1e-3)


def blend(samples1, samples2, factor):
    """As ComfyUI's LatentBlend: the first one's keys, the samples mixed."""
    return {**samples1, "samples": samples1["samples"] * factor + samples2["samples"] * (1 - factor)}


def test_a_blend_of_pictures_keeps_the_size(run, loaded, stage_b):
    def compressed(image):
        return run("WuerstchenSemanticCompress", vae=loaded["semantic"], image=image,
                   width=136, height=200)  # fmt: skip

    mixed = blend(compressed(picture(90, 70)), compressed(picture(300, 200)), 0.5)
    image = run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent=stage_b(mixed))
    assert image.shape == (1, 200, 136, 3)


def test_latents_that_lost_their_keys_are_taken_by_their_size(run, loaded, empty, stage_b):
    bare = {"samples": empty(136, 200)["samples"]}  # as LoadLatent gives it
    image = run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent=stage_b(bare))
    assert image.shape == (1, 256, 192, 3)
    bare = {"samples": stage_b(bare)["samples"]}
    assert run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent=bare).shape == (1, 256, 192, 3)


def test_latents_that_were_resized_are_taken_by_their_size(run, loaded, empty, stage_b):
    resized = {**empty(128, 128), "samples": noise(1, 16, 6, 3)}  # as LatentUpscale or LatentRotate gives it
    latent = stage_b(resized)
    assert run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent=latent).shape == (1, 256, 128, 3)
    latent = stage_b(empty(136, 200))
    cut = {**latent, "samples": latent["samples"][:, :, 3:20, 5:32]}
    assert run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent=cut).shape == (1, 68, 108, 3)


def test_what_comes_in_stays_as_it_was(run, loaded, empty, stage_c, stage_b):
    latent = {**empty(), "samples": noise(1, 16, 3, 3), "noise_mask": torch.ones(1, 1, 64, 64), "extra": 1}
    before = {key: value.clone() if torch.is_tensor(value) else value for key, value in latent.items()}
    sampled = stage_c(latent)
    stage_b(latent)
    assert list(latent) == list(before)
    assert latent["samples"].equal(before["samples"]) and latent["noise_mask"].equal(before["noise_mask"])
    assert sampled["extra"] == 1
    image = picture(64, 64)
    kept = image.clone()
    run("WuerstchenVQGANEncode", vae=loaded["stage_a"], image=image)
    run(
        "WuerstchenSemanticCompress",
        vae=loaded["semantic"],
        image=image,
        width=128,
        height=128,
    )
    assert image.equal(kept)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m_sde"])
def test_only_what_the_mask_covers_is_drawn(run, loaded, stage_c, sampler):
    start = {**run("WuerstchenEmptyLatent", width=512, height=256, batch_size=2), "samples": noise(2, 16, 6, 12)}
    mask = torch.zeros(1, 1, 256, 512)
    mask[..., :256] = 1  # the left half
    drawn = stage_c({**start, "noise_mask": mask}, sampler=sampler)["samples"]
    assert drawn[..., 6:].equal(start["samples"][..., 6:])
    assert (drawn[..., :6] - start["samples"][..., :6]).abs().amin() > 0
    assert not drawn[..., :6].allclose(stage_c(start, sampler=sampler)["samples"][..., :6])


def test_the_mask_is_the_cores_and_one_for_each_picture(text, tiny, stage_c):
    start, mask, pixels = noise(2, 16, 6, 6), torch.zeros(2, 1, 6, 6), torch.zeros(2, 1, 256, 256)
    mask[0, :, :3], mask[1, :, :, 3:] = 1, 1
    pixels[0, :, :128], pixels[1, :, :, 128:] = 1, 1
    latent = stage_c({"samples": start, "noise_mask": pixels}, cfg=3.0, seed=9)
    expected = sample_stage_c(
        tiny.stage_c,
        start,
        text("a cat")[0][0],
        text("")[0][0],
        cfg=3.0,
        steps=3,
        seed=9,
        mask=mask,
        sampler=QUICK_C["sampler"],
    )
    torch.testing.assert_close(latent["samples"], expected, rtol=1e-3, atol=1e-4)


def test_a_latent_of_the_wrong_stage_says_where_to_take_it_from(run, nodes, loaded, empty, stage_c, stage_b):
    of_c, of_a, video = empty(), {"samples": noise(1, 4, 32, 32)}, {"samples": noise(1, 16, 2, 6, 6)}
    named = {node.define_schema().display_name for node in nodes.values()}
    cases = [
        (lambda: stage_c(of_a), ("Würstchen Empty Latent", "Würstchen Semantic Compress")),
        (lambda: stage_c(video), ("Würstchen Empty Latent", "Würstchen Semantic Compress")),
        (lambda: stage_b(of_a), ("Würstchen Stage C Sampler", "Würstchen Semantic Compress")),
        (
            lambda: run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent=of_c),
            ("Würstchen Stage B Sampler", "Würstchen VQGAN Encode"),
        ),
        (
            lambda: run("WuerstchenSemanticPreview", latent=of_a),
            ("Würstchen Stage C Sampler", "Würstchen Semantic Compress"),
        ),
    ]
    for wrong, sources in cases:
        with pytest.raises(ValueError, match="take it from") as caught:
            wrong()
        for source in sources:
            assert source in named and source in str(caught.value).split("take it from")[1]


def test_a_size_that_is_no_multiple_of_8_is_refused(empty):
    with pytest.raises(ValueError, match="width is 250"):
        empty(width=250)
