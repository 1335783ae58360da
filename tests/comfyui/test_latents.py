"""ComfyUI's latent nodes between our stages, masks on latents, and exact sizes."""

import pytest
import torch

from tests.comfyui.host import apart, noise, picture
from tests.reference import distance


@pytest.fixture
def half():
    """A mask of the right half of a picture of 512 x 256."""
    mask = torch.zeros(1, 256, 512)
    mask[..., 256:] = 1
    return mask


def sampled(run, model, positive, negative, latent):
    return run("WuerstchenStageCSampler", model=model, positive=positive, negative=negative, latent=latent, seed=1,
               steps=6, cfg=2.0, sampler="ddpm", schedule="even", denoise=1.0)  # fmt: skip


def test_a_noise_mask_keeps_the_rest(call, run, tinies, text, ksampler, half):
    start = {"samples": noise(1, 16, 6, 12)}
    masked = call("SetLatentNoiseMask", samples=start, mask=half)
    ours = sampled(run, tinies.model_c, text("a cat"), text(""), masked)
    for drawn in (ksampler(masked), ours):
        positive, negative, fine = call("WuerstchenStageBConditioning", latent=drawn)
        assert "noise_mask" not in fine  # it was Stage C's
        kept, redrawn = ((drawn["samples"] - start["samples"])[..., part] for part in (slice(0, 5), slice(7, None)))
        assert kept.abs().max() < 1e-5 and redrawn.abs().mean() > 0.1


def test_differential_diffusion(call, run, tinies, text, ksampler):
    start = {"samples": noise(1, 16, 6, 12)}
    soft = torch.linspace(0, 1, 512).repeat(1, 256, 1)
    masked = call("SetLatentNoiseMask", samples=start, mask=soft)
    model = call("DifferentialDiffusion", model=tinies.model_c)
    for drawn in (ksampler(masked, model), sampled(run, model, text("a cat"), text(""), masked)):
        change = (drawn["samples"] - start["samples"]).abs().mean(dim=(0, 1, 2))
        assert change[0] < 0.1 * change[-1]


@pytest.mark.parametrize("stage", ["c", "b"])
def test_inpainting(call, tinies, text, ksampler, half, stage):
    image = picture(256, 512)
    vae = tinies.semantic if stage == "c" else tinies.stage_a
    latent = call("VAEEncodeForInpaint", pixels=image, vae=vae, mask=half, grow_mask_by=6)
    if stage == "c":
        drawn = ksampler(latent)
    else:
        semantic = call("VAEEncode", pixels=image, vae=tinies.semantic)
        positive, negative, _ = call("WuerstchenStageBConditioning", latent=semantic, positive=text("a cat"))
        drawn = ksampler(latent, tinies.model_b, positive, negative, cfg=1.0)
    change = (drawn["samples"] - latent["samples"]).abs().mean(dim=(0, 1, 2))
    columns = len(change)
    assert change[: columns // 3].max() < 1e-4 < 1e-2 < change[-columns // 3 :].min()


def test_latent_nodes_between_the_stages(call, run, tinies, text, ksampler, empty, tmp_path, monkeypatch):
    latent = ksampler(empty(batch_size=3))
    one = call("LatentFromBatch", samples=latent, batch_index=1, length=1)
    assert torch.equal(one["samples"], latent["samples"][1:2]) and one["batch_index"] == [1]
    twice = call("RepeatLatentBatch", samples=one, amount=2)
    both = call("LatentBatch", samples1=one, samples2=twice)
    [*parts] = call("RebatchLatents", latents=[both], batch_size=[2])
    blended = call("LatentBlend", samples1=one, samples2={"samples": latent["samples"][:1]}, blend_factor=0.25)
    expected = latent["samples"][1:2] * 0.25 + latent["samples"][:1] * 0.75
    torch.testing.assert_close(blended["samples"], expected)
    larger = call("LatentUpscale", samples=one, upscale_method="bilinear", width=96, height=96, crop="disabled")
    larger_by = call("LatentUpscaleBy", samples=one, upscale_method="bilinear", scale_by=2.0)
    assert larger["samples"].shape == larger_by["samples"].shape == (1, 16, 12, 12)
    for given in (one, twice, both, parts[0], blended, larger_by):
        positive, negative, start = call("WuerstchenStageBConditioning", latent=given, positive=text("a cat"))
        image = run("WuerstchenVQGANDecode", vae=tinies.stage_a,
                    latent=ksampler(start, tinies.model_b, positive, negative, steps=1, cfg=1.0))  # fmt: skip
        side = 512 if given is larger_by else 256
        assert image.shape == (len(given["samples"]), side, side, 3)


def test_saved_latents(call, run, ksampler, empty, host_nodes, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    latent = ksampler(empty())
    call("SaveLatent", samples=latent, filename_prefix="kept")
    [file] = tmp_path.glob("*.latent")
    again = call("LoadLatent", latent=file.name)
    torch.testing.assert_close(again["samples"], latent["samples"])


@pytest.mark.parametrize(("width", "height"), [(344, 200), (256, 256), (520, 136)])
def test_two_ksamplers_give_exactly_the_size_asked_for(call, run, tinies, text, ksampler, empty, width, height):
    latent = ksampler(empty(width, height), steps=2)
    positive, negative, start = call("WuerstchenStageBConditioning", latent=latent)
    latent = ksampler(start, tinies.model_b, positive, negative, steps=2, cfg=1.0)
    image = run("WuerstchenVQGANDecode", vae=tinies.stage_a, latent=latent)
    whole = call("VAEDecode", vae=tinies.stage_a, samples=latent)
    assert image.shape == (1, height, width, 3)
    top, left = (whole.shape[1] - height) // 2, (whole.shape[2] - width) // 2
    assert torch.equal(whole[:, top : top + height, left : left + width], image)


def test_stage_b_takes_a_picture_of_any_size(call, tinies, text, ksampler):
    """Encoded by VAEEncode, whose latents are no multiples of 16: the picture is kept where little is redrawn."""
    image = picture(200, 328)
    start = call("VAEEncode", pixels=image, vae=tinies.stage_a)
    semantic = call("VAEEncode", pixels=image, vae=tinies.semantic)
    assert start["samples"].shape == (1, 4, 50, 82) and semantic["samples"].shape == (1, 16, 6, 9)
    positive, negative, _ = call("WuerstchenStageBConditioning", latent=semantic, positive=text("a cat"))
    near = ksampler(start, tinies.model_b, positive, negative, cfg=1.0, denoise=0.1)
    far = ksampler(start, tinies.model_b, positive, negative, cfg=1.0, denoise=1.0)
    assert apart(near, start) < apart(far, start)


def test_a_latent_in_the_middle_of_a_larger_one_is_sampled_as_there(tinies):
    """What is added around it lies on both sides, as the semantic latent has it."""
    network = tinies.model_b.model.diffusion_model
    x, t, semantic = noise(1, 4, 26, 24), torch.tensor([0.5]), noise(1, 16, 3, 3)
    with torch.inference_mode():
        condition = network.condition(semantic, None, (32, 32))
        padded = torch.nn.functional.pad(x, (4, 4, 3, 3), mode="replicate")
        whole = network.denoise(padded, network.modulate(t, x.dtype), condition)
        part = network(x, t, condition=condition)
    assert distance(part, whole[..., 3:29, 4:28]) < 1e-5


@pytest.mark.parametrize("channels", [3, 4])
def test_vae_nodes_on_stage_a(call, tinies, channels):
    image = picture(256, 256, channels=channels)
    latent = call("VAEEncode", pixels=image, vae=tinies.stage_a)
    tiled = call("VAEEncodeTiled", pixels=image, vae=tinies.stage_a, tile_size=128, overlap=32)
    assert apart(tiled, latent) < 0.15
    whole = call("VAEDecode", samples=latent, vae=tinies.stage_a)
    tiled = call("VAEDecodeTiled", samples=latent, vae=tinies.stage_a, tile_size=128, overlap=32)
    assert whole.shape == tiled.shape == (1, 256, 256, 3) and (whole - tiled).abs().mean() < 0.02
    assert whole.min() >= 0 and whole.max() <= 1


def test_vae_nodes_on_the_semantic_vae(call, minis):
    image = picture(256, 256)
    latent = call("VAEEncode", pixels=image, vae=minis.semantic)
    tiled = call("VAEEncodeTiled", pixels=image, vae=minis.semantic, tile_size=128, overlap=32)
    assert torch.equal(tiled["samples"], latent["samples"]) and latent["samples"].shape == (1, 16, 6, 6)
    whole = call("VAEDecode", samples=latent, vae=minis.semantic)
    tiled = call("VAEDecodeTiled", samples=latent, vae=minis.semantic, tile_size=512, overlap=64)
    assert whole.shape == tiled.shape == (1, 48, 48, 3) and (whole - tiled).abs().max() < 0.05
