"""Every node gives what the core gives."""

import pytest
import torch

import wuerstchen_core as w
from tests.nodes.inputs import LARGEST_SEED, noise, picture, same
from wuerstchen_core import Geometry
from wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW
from wuerstchen_core.pipeline import compress, decode, encode, fit, preview, sample_stage_b, sample_stage_c

OPTIONS_C = {"seed": LARGEST_SEED, "steps": 3, "cfg": 3.0, "sampler": "ddim", "schedule": "uneven", "denoise": 0.7}
OPTIONS_B = {"seed": LARGEST_SEED, "steps": 2, "cfg": 2.0, "sampler": "ddim"}


def on_white(image):
    return image[..., :3] * image[..., 3:] + 1 - image[..., 3:] if image.shape[-1] == 4 else image


def test_text_encode_is_the_cores(text, tiny):
    [[encoded, extra]] = text("a cat in fluent style")
    assert extra == {} and encoded.shape == (1, 77, 32)
    same(encoded, tiny.text_encoder_c(["a cat in fluent style"]))


def test_empty_latent_is_zeros_in_stage_cs_space(empty):
    latent = empty(width=512, height=256, batch_size=3)
    assert latent["samples"].shape == (3, 16, 6, 12) and not latent["samples"].any()


@pytest.mark.parametrize("channels", [3, 4])
def test_semantic_compress_is_the_cores(run, loaded, tiny, channels):
    image = picture(150, 333, batch=2, channels=channels)
    latent = run("WuerstchenSemanticCompress", semantic_compressor=loaded["semantic_compressor"], image=image,
                 width=200, height=136)  # fmt: skip
    same(latent["samples"], compress(tiny.semantic_compressor, fit(on_white(image), Geometry(200, 136))))


def test_stage_c_sampler_is_the_cores(text, tiny, stage_c):
    start, positive, negative = noise(2, 16, 5, 3), text("a cat"), text("a dog")
    latent = stage_c({"samples": start}, positive=positive, negative=negative, **OPTIONS_C)
    same(latent["samples"], sample_stage_c(tiny.stage_c, start, positive[0][0], negative[0][0], **OPTIONS_C))


def test_stage_b_sampler_is_the_cores(text, tiny, stage_b):
    semantic, positive, negative = noise(2, 16, 3, 5), text("a cat"), text("a dog")
    geometry = Geometry(width=192, height=128)
    latent = stage_b({"samples": semantic}, positive=positive, negative=negative, **OPTIONS_B)
    expected = sample_stage_b(tiny.stage_b, semantic, geometry, positive[0][0], negative[0][0], **OPTIONS_B)
    same(latent["samples"], expected)


def test_stage_b_sampler_goes_without_text(tiny, stage_b):
    semantic = noise(1, 16, 3, 3)
    expected = sample_stage_b(tiny.stage_b, semantic, Geometry(128, 128), **OPTIONS_B)
    same(stage_b({"samples": semantic}, **OPTIONS_B)["samples"], expected)


def test_vqgan_encode_and_decode_are_the_cores(run, loaded, tiny):
    image = picture(136, 200, batch=2)
    latent = run("WuerstchenVQGANEncode", stage_a=loaded["stage_a"], image=image)
    same(latent["samples"], encode(tiny.stage_a, image))
    decoded = run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=latent)
    same(decoded, decode(tiny.stage_a, latent["samples"], Geometry(200, 136)))
    assert decoded.shape == image.shape


def test_vqgan_encode_cuts_what_does_not_fit_and_puts_transparency_on_white(run, loaded):
    image = picture(141, 203, channels=4)
    latent = run("WuerstchenVQGANEncode", stage_a=loaded["stage_a"], image=image)
    cut = run("WuerstchenVQGANEncode", stage_a=loaded["stage_a"], image=on_white(image)[:, 2:138, 1:201])
    same(latent["samples"], cut["samples"])


def test_semantic_preview_is_the_cores(run, previewer, previewer_file):
    latent = {"samples": noise(2, 16, 3, 5), "extra": 1}
    images = run("WuerstchenSemanticPreview", latent=latent, previewer=previewer)
    assert images.shape == (2, 24, 40, 3) and images.dtype == torch.float32
    same(images, preview(w.load_previewer(previewer_file), latent["samples"]))


def test_semantic_preview_goes_without_a_previewer(run):
    """Both where nothing is linked and where a set without a previewer is."""
    samples = noise(2, 16, 3, 5)
    expected = preview(w.load_previewer(LINEAR_PREVIEW), samples)
    same(run("WuerstchenSemanticPreview", latent={"samples": samples}), expected)
    same(run("WuerstchenSemanticPreview", latent={"samples": samples}, previewer=None), expected)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (264, 200), (136, 328)])
def test_pictures_have_the_size_asked_for(run, loaded, empty, stage_c, stage_b, width, height):
    latent = stage_b(stage_c(empty(width, height)))
    image = run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=latent)
    assert image.shape == (1, height, width, 3)
    assert image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize("denoise", [0.5, 0.0])
def test_pictures_from_pictures_have_the_size_asked_for(run, loaded, stage_c, stage_b, denoise):
    latent = run("WuerstchenSemanticCompress", semantic_compressor=loaded["semantic_compressor"],
                 image=picture(90, 301), width=328, height=136)  # fmt: skip
    latent = stage_b(stage_c(latent, denoise=denoise))
    assert run("WuerstchenVQGANDecode", stage_a=loaded["stage_a"], latent=latent).shape == (1, 136, 328, 3)
