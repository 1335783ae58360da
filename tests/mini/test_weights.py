"""The embedded model: what its card says of it holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors import safe_open

import wuerstchen_core as w
from wuerstchen_core import pipeline
from wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW, MINI
from wuerstchen_core.mini.evaluation import psnr
from wuerstchen_core.mini.samples import CAPTION, CFG, COLUMNS, PROMPTS, SIDE
from wuerstchen_core.training import command
from wuerstchen_core.training.options import load
from wuerstchen_core.training.stages.previewer import small


@pytest.fixture(scope="module")
def model():
    return w.Wuerstchen.mini()


def card_sample(number):
    """(256, 256, 3) in [0, 1]: what the card's sheet shows for PROMPTS[number]"""
    left, top = number % COLUMNS * SIDE, number // COLUMNS * (SIDE + CAPTION)
    with Image.open(MINI.parent / "samples.png") as sheet:
        return torch.from_numpy(np.array(sheet.crop((left, top, left + SIDE, top + SIDE)))).float() / 255


def test_it_ships_in_half_precision_within_48_mb():
    weights = sorted(MINI.glob("*.safetensors"))
    assert len(weights) == 8
    assert sum(path.stat().st_size for path in weights) <= 48e6
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}


def test_its_sizes_are_those_of_the_shipped_configurations(model):
    """But for the text encoder, which has nine layers: it is older than its configuration."""
    configured = {
        stage: command.read_all(command._classes(stage), load(str(command.CONFIGS / "mini" / f"{name}.toml")), name)[-1]
        for stage, (name, _) in command.STAGES.items()
        if stage in ("stage-a", "stage-b", "stage-c", "previewer")
    }
    scale = model.stage_a.config.scale_factor
    assert model.stage_a.config == replace(configured["stage-a"].network, scale_factor=scale)
    space = model.semantic_compressor.config.latent_space
    assert model.stage_b.config == replace(configured["stage-b"].network, stage_a_scale=scale, latent_space=space)
    assert model.stage_c.config == configured["stage-c"].network
    assert model.previewer.config == configured["previewer"].network
    assert model.semantic_compressor.config == configured["previewer"].compressor == configured["stage-b"].compressor
    assert model.text_encoder_b is model.text_encoder_c


def test_no_weight_is_out_of_range(model):
    for network in (model.stage_a, model.stage_b, model.stage_c, model.text_encoder_c, model.semantic_compressor,
                    model.previewer):  # fmt: skip
        assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


@pytest.mark.parametrize("number", [0, 4])
def test_it_draws_what_the_card_shows(model, number):
    picture = model.generate(PROMPTS[number], cfg_c=CFG)
    assert psnr(picture, card_sample(number)[None]).item() > 35


def test_the_prompt_matters(model):
    """Each of two pictures is nearer to the card's picture of its own prompt, from other seeds too."""
    for seed in (1, 2):
        for number, other in ((4, 6), (6, 4)):
            picture = model.generate(PROMPTS[number], seed=seed, cfg_c=CFG)
            own, rival = (psnr(picture, card_sample(which)[None]).item() for which in (number, other))
            assert own > rival + 3


def test_a_picture_survives_stage_a_and_its_variation(model):
    sample = card_sample(0)[None]
    planes = sample.permute(0, 3, 1, 2)
    with torch.inference_mode():
        again = model.stage_a.decode(model.stage_a.encode(planes)).permute(0, 2, 3, 1).clamp(0, 1)
    assert psnr(again, sample).item() > 28
    variation = model.generate("", image=sample, denoise=0.0)
    assert psnr(variation, sample).item() > 17


def test_the_previewer_sees_more_than_one_colour_a_position(model):
    samples = torch.stack([card_sample(number) for number in range(len(PROMPTS))])
    latent = pipeline.compress(model.semantic_compressor, samples)
    truth = rearrange(small(rearrange(samples, "b h w c -> b c h w")), "b c h w -> b h w c")
    linear = w.load_previewer(LINEAR_PREVIEW)
    drawn, rough = (psnr(pipeline.preview(network, latent), truth).mean() for network in (model.previewer, linear))
    assert drawn > rough + 3


def test_the_card_lists_every_file():
    card = (MINI.parent / "README.md").read_text(encoding="utf-8")
    for path in MINI.glob("*.safetensors"):
        size = f"{path.stat().st_size / 1e6:.1f}"
        assert any(path.name in line and size in line for line in card.splitlines()), path.name
