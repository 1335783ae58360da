"""The networks that the nodes load, and the nodes that most tests go through."""

import pytest
import torch

import wuerstchen_core as w
from tests.loras import style  # noqa: F401, a fixture
from tests.nodes.inputs import QUICK_B, QUICK_C
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig


@pytest.fixture(scope="module")
def loaded(run):
    names = ("text_encoder_c", "stage_c", "text_encoder_b", "stage_b", "stage_a", "semantic_compressor", "previewer")
    return dict(zip(names, run("WuerstchenLoadModel", model="tiny"), strict=True))


@pytest.fixture(scope="module")
def text(run, loaded):
    """prompt -> CONDITIONING"""
    return lambda prompt: run("WuerstchenTextEncode", text_encoder=loaded["text_encoder_c"], text=prompt)


@pytest.fixture
def stage_c(run, loaded, text):
    def sample(latent, **options):
        inputs = {"positive": text("a cat"), "negative": text(""), **QUICK_C, **options}
        return run("WuerstchenStageCSampler", stage_c=loaded["stage_c"], latent=latent, **inputs)

    return sample


@pytest.fixture
def stage_b(run, loaded):
    def sample(latent, **options):
        return run("WuerstchenStageBSampler", stage_b=loaded["stage_b"], latent=latent, **{**QUICK_B, **options})

    return sample


@pytest.fixture(scope="module")
def previewer(module, previewer_file):
    return module("nodes.host").LOADERS["previewer"](previewer_file)


@pytest.fixture
def empty(run):
    return lambda width=128, height=128, batch_size=1: run(
        "WuerstchenEmptyLatent", width=width, height=height, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def previewer_file(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("previewer") / "previewer.safetensors"
    w.save(Previewer(PreviewerConfig(widths=(8, 8, 4, 4))), path)
    return path
