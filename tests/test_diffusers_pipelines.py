"""The whole of text to image against diffusers' two pipelines: the same weights, starting noise and step noise.

The sizes are those that diffusers gives exactly: multiples of 128. At others its Stage B gets a latent that it fails
on, or a picture of another size comes out.
"""

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import (
    PaellaVQModel,
    WuerstchenDecoderPipeline,
    WuerstchenDiffNeXt,
    WuerstchenPrior,
    WuerstchenPriorPipeline,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import wuerstchen_core as w
from tests.checkpoints.published import small_compressor
from tests.pictures import psnr
from tests.reference import clip_tokenizer, randomise, steps_of_diffusers
from wuerstchen_core import pipeline
from wuerstchen_core.diffusion import samplers


def text_model(width):
    return randomise(
        CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=2,
                num_attention_heads=width // 64,
                hidden_act="gelu",
            )
        )
    )


@pytest.fixture(scope="module")
def theirs():
    """diffusers' pipelines on random networks that, as trained ones do, find that the noise is about x."""
    prior = randomise(WuerstchenPrior(c_in=16, c=64, c_cond=128, c_r=64, depth=2, nhead=1))
    decoder = randomise(
        WuerstchenDiffNeXt(
            c_hidden=[64, 64, 64, 128], nhead=[-1, 1, 1, 2], blocks=[1, 1, 2, 1], c_cond=48, clip_embd=64
        )
    )
    vqgan = randomise(PaellaVQModel(embed_dim=32, bottleneck_blocks=2, num_vq_embeddings=64))
    prior.out[1].weight.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
    prior.out[1].bias.mul_(0.1)
    decoder.clf[1].weight.mul_(0.3)
    decoder.clf[1].bias[16:] += 3  # sigmoid(b) near 1
    vqgan.out_block[0].weight.mul_(0.05)
    vqgan.out_block[0].bias.fill_(0.5)
    tokenizer, scheduler = clip_tokenizer(), DDPMWuerstchenScheduler()
    to_latent = WuerstchenPriorPipeline(tokenizer, text_model(128), prior, scheduler)
    to_picture = WuerstchenDecoderPipeline(tokenizer, text_model(64), decoder, scheduler, vqgan)
    for pipe in (to_latent, to_picture):
        pipe.set_progress_bar_config(disable=True)
    return to_latent, to_picture


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    to_latent, to_picture = theirs
    folder = tmp_path_factory.mktemp("diffusers")
    weights = {
        "stage_a": to_picture.vqgan.state_dict(),
        "stage_b": to_picture.decoder.state_dict(),
        "stage_c": to_latent.prior.state_dict(),
        "text_encoder_c": to_latent.text_encoder.state_dict(),
        "text_encoder_b": to_picture.text_encoder.state_dict(),
        "semantic_compressor": small_compressor(),
    }
    for role, tensors in weights.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{role}.safetensors")
    return w.Wuerstchen.from_files(**{role: folder / f"{role}.safetensors" for role in weights})


@pytest.mark.parametrize(
    "width, height, batch, negative, steps_c, cfg_c, steps_b, cfg_b",
    [
        (256, 256, 1, "", 12, 4.0, 6, 1.0),
        (384, 128, 2, "a dog, blurred", 5, 8.0, 3, 1.0),
        (128, 512, 1, "a dog", 3, 1.0, 4, 3.0),
        (256, 128, 2, "", 2, 4.0, 2, 2.0),
    ],
)
def test_pictures_are_diffusers(
    ours, theirs, monkeypatch, width, height, batch, negative, steps_c, cfg_c, steps_b, cfg_b
):
    """Guidance of 1 is what diffusers calls 0: off."""
    prompt = "a photo of a cat, wearing a hat"
    to_latent, to_picture = theirs
    latent = to_latent(
        prompt,
        height,
        width,
        steps_c,
        guidance_scale=cfg_c,
        negative_prompt=negative,
        num_images_per_prompt=batch,
        generator=torch.Generator().manual_seed(7),
    ).image_embeddings
    expected = to_picture(
        latent,
        prompt,
        steps_b,
        guidance_scale=cfg_b,
        negative_prompt=negative,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images

    def draw_as_diffusers(latent, seed, batch_index):
        generator = torch.Generator().manual_seed(seed)
        return lambda: torch.randn(latent.shape, generator=generator)

    monkeypatch.setattr(pipeline, "noise_source", draw_as_diffusers)
    monkeypatch.setattr(samplers, "_steps", steps_of_diffusers)
    pictures = ours.generate(
        prompt,
        negative_prompt=negative,
        width=width,
        height=height,
        batch_size=batch,
        seed=7,
        steps_c=steps_c,
        cfg_c=cfg_c,
        steps_b=steps_b,
        cfg_b=cfg_b,
        sampler="ddpm",
        schedule_b="even",
    )
    expected = expected.permute(0, 2, 3, 1)
    assert pictures.shape == expected.shape == (batch, height, width, 3)
    inside = ((expected > 0) & (expected < 1)).float().mean()
    assert inside > 0.9 and expected.std() > 0.05  # pictures, not white or black
    assert psnr(pictures, expected) >= 100  # not 60: these networks react to a mistake less than trained ones


def test_another_text_is_another_picture(ours):
    """What the comparison above would not show if the networks did not listen."""
    options = {"width": 128, "height": 128, "steps_c": 2, "cfg_c": 4.0, "steps_b": 2, "cfg_b": 2.0, "sampler": "ddpm"}
    picture = ours.generate("a cat", **options)
    assert psnr(ours.generate("a cats", **options), picture) < 50
    assert psnr(ours.generate("a cat", negative_prompt="a dog", **options), picture) < 50
