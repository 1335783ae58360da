"""Every network at its released size, from a file in a published layout, against the other implementation.

Not in the default run: `pytest -m slow -s` runs them and prints the figures. They take 10 GiB of memory and minutes.
"""

import time

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tests.checkpoints.published import LOADERS, G, H, PublishedCompressor, as_published
from tests.reference import clip_tokenizer, distance, randomise

TOLERANCE = 1e-4  # relative, float32
PROMPTS = ["a cat", "an oil painting of a lighthouse by the sea in a storm, with 3 gulls above it"]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def run_stage_a(network):
    image, latent = draw(1, 3, 256, 256).sigmoid(), draw(1, 4, 64, 64)
    if isinstance(network, PaellaVQModel):
        encoded, decoded = network.encode(image).latents / 0.3764, network.decode(latent * 0.3764).sample
    else:
        encoded, decoded = network.encode(image), network.decode(latent)
    return torch.cat([encoded.flatten() / encoded.std(), decoded.flatten() / decoded.std()])


def run_stage_b(network):
    return network(draw(2, 4, 64, 64), torch.tensor([1.0, 0.4]), draw(2, 16, 6, 6), draw(2, 77, 1024))


def run_stage_c(network):
    return network(draw(2, 16, 12, 12), torch.tensor([0.9, 0.1]), draw(2, 77, 1280))


def run_compressor(network):
    return network(draw(1, 3, 768, 768).sigmoid())


def run_text_encoder(network):
    if hasattr(network, "tower"):
        return network(PROMPTS)
    return network(**clip_tokenizer()(PROMPTS, padding="max_length", return_tensors="pt")).last_hidden_state


RELEASED = {
    "Stage A": ("stage_a", PaellaVQModel, run_stage_a),
    "semantic compressor": ("semantic_compressor", PublishedCompressor, run_compressor),
    "CLIP H": ("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(hidden_act="gelu", **H)), run_text_encoder),
    "CLIP bigG": ("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(hidden_act="gelu", **G)), run_text_encoder),
    "Stage B": ("stage_b", lambda: as_published(WuerstchenDiffNeXt()), run_stage_b),
    "Stage C": (
        "stage_c",
        lambda: as_published(WuerstchenPrior(c=1536, c_cond=1280, depth=32, nhead=24)),
        run_stage_c,
    ),
}


def built(build):
    """The network with random weights, and none that were drawn before them."""
    with torch.device("meta"):
        network = build()
    network.to_empty(device="cpu")
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(77))
    network = randomise(network)
    if isinstance(network, WuerstchenPrior):
        network.out[1].weight.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
        network.out[1].bias.mul_(0.1)
    return network


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
@torch.no_grad()
def test_released_size(name, tmp_path):
    kind, build, run = RELEASED[name]
    theirs = built(build)
    expected = run(theirs)
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    path = tmp_path / "weights.safetensors"
    save_file(theirs.state_dict(), path)
    del theirs
    try:
        start = time.perf_counter()
        ours = LOADERS[kind](path)
        loaded = time.perf_counter()
        error = distance(run(ours), expected)
        ran = time.perf_counter()
    finally:
        path.unlink()
    print(
        f"\n{name}: {parameters / 1e6:,.1f} M parameters, relative error {error:.1e}, "
        f"loaded in {loaded - start:.1f} s, run in {ran - loaded:.1f} s"
    )
    assert error < TOLERANCE
