"""The previewer: its sizes, its file and what is drawn with it."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import wuerstchen_core as w
from tests.previewers import SMALL, mapped, noise
from wuerstchen_core.checkpoints.describe import describe
from wuerstchen_core.checkpoints.load import METADATA_KEY
from wuerstchen_core.checkpoints.sets import find_set
from wuerstchen_core.cli import main
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig
from wuerstchen_core.pipeline import preview

# The network


def test_the_default_is_of_the_papers_size():
    with torch.device("meta"):
        network = Previewer()
        assert network(torch.empty(1, 16, 24, 24)).shape == (1, 3, 192, 192)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == 3.9


@pytest.mark.parametrize("config", [SMALL, PreviewerConfig(12, widths=())])
def test_pictures_are_8_times_the_latent(config):
    assert Previewer(config)(noise(2, config.latent_channels, 3, 5)).shape == (2, 3, 24, 40)


@torch.no_grad()
def test_what_is_drawn_lies_where_the_latent_says():
    """A change at one position of the latent changes the picture there most, in rows and in columns."""
    torch.manual_seed(0)
    network, latent = Previewer(SMALL), noise(1, 16, 6, 9)
    changed = latent.clone()
    changed[..., 4, 2] += 3
    difference = F.avg_pool2d((network(changed) - network(latent)).abs().mean(dim=1), 8)[0]
    assert divmod(difference.argmax().item(), 9) == (4, 2)
    assert not difference[0].any() and not difference[:, 8].any()  # nothing goes all the way


def test_without_widths_each_position_is_one_colour():
    network = Previewer(PreviewerConfig(widths=()))
    latent = noise(2, 16, 3, 5)
    weight, bias = network.layers[0].weight[:, :, 0, 0], network.layers[0].bias
    colours = torch.einsum("oc,bcpq->bopq", weight, latent) + bias[:, None, None]
    expected = colours.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    torch.testing.assert_close(network(latent), expected)
    assert sum(parameter.numel() for parameter in network.parameters()) == 51


@pytest.mark.parametrize("widths", [(8,), (8, 8, 8), (8, 8, 8, 8, 8)])
def test_other_numbers_of_widths_are_refused(widths):
    with pytest.raises(w.WuerstchenError, match=r"widths are \[8.*: a previewer has four, or none"):
        Previewer(PreviewerConfig(widths=widths))


def test_operations_make_all_layers_that_have_weights():
    class Ours(torch.nn.Module):
        pass

    class Operations:
        Conv2d = type("Conv2d", (Ours, torch.nn.Conv2d), {})
        ConvTranspose2d = type("ConvTranspose2d", (Ours, torch.nn.ConvTranspose2d), {})

    for config in (SMALL, PreviewerConfig(widths=())):
        weighted = [module for module in Previewer(config, Operations).modules() if hasattr(module, "weight")]
        assert weighted and all(isinstance(module, Ours) for module in weighted)


# Files


@pytest.mark.parametrize("config", [SMALL, PreviewerConfig(widths=())])
def test_what_is_saved_is_loaded_told_and_converted(config, tmp_path, capsys):
    network = Previewer(config)
    w.save(network, tmp_path / "p.safetensors")
    again = w.load_previewer(tmp_path / "p.safetensors")
    assert again.config == config and not again.training
    latent = noise(1, 16, 3, 3)
    assert torch.equal(again(latent), network(latent))
    assert "previewer: load_previewer takes it" in list(describe(tmp_path / "p.safetensors"))
    assert main(["convert", str(tmp_path / "p.safetensors"), "-o", str(tmp_path), "--dtype", "float16"]) == 0
    half = w.load_previewer(tmp_path / "previewer.safetensors", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    weights = load_file(tmp_path / "previewer.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_files_that_are_no_previewer_are_named(tiny_folder, tmp_path):
    w.save(Previewer(SMALL), tmp_path / "p.safetensors")
    with pytest.raises(w.WuerstchenError, match="stage_c.safetensors: this is a stage_c file; load_stage_c takes it"):
        w.load_previewer(tiny_folder / "stage_c.safetensors")
    with pytest.raises(w.WuerstchenError, match="p.safetensors: this is a previewer file; load_previewer takes it"):
        w.load_stage_c(tmp_path / "p.safetensors")
    tensors = load_file(tmp_path / "p.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(w.WuerstchenError, match="bare.safetensors: this is no network of Würstchen .*previewer file"):
        w.load_previewer(tmp_path / "bare.safetensors")
    header = {METADATA_KEY: json.dumps({"network": "previewer", "config": {"widths": [8, 8]}})}
    save_file(tensors, tmp_path / "odd.safetensors", header)
    with pytest.raises(w.WuerstchenError, match=r"odd.safetensors: there is no previewer .* widths are \[8, 8\]"):
        w.load_previewer(tmp_path / "odd.safetensors")
    tensors.pop("layers.0.bias")
    header = {METADATA_KEY: json.dumps({"network": "previewer", "config": {"widths": [16, 8, 8, 4]}})}
    save_file(tensors, tmp_path / "torn.safetensors", header)
    with pytest.raises(w.WuerstchenError, match="torn.safetensors: an incomplete previewer file, layers.0.bias is"):
        w.load_previewer(tmp_path / "torn.safetensors")
    with pytest.raises(w.WuerstchenError, match="none.safetensors"):
        w.load_previewer(tmp_path / "none.safetensors")


def test_a_set_may_have_a_previewer(tiny_folder, tiny, tmp_path):
    assert "previewer" not in find_set(tiny_folder) and tiny.previewer is None
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    w.save(Previewer(SMALL), tmp_path / "previewer.safetensors")
    assert find_set(tmp_path)["previewer"] == tmp_path / "previewer.safetensors"
    assert w.Wuerstchen.from_folder(tmp_path).previewer.config == SMALL


# Previews


def test_a_preview_is_what_the_network_draws_clamped():
    torch.manual_seed(1)
    network, latent = Previewer(SMALL), 2 * noise(2, 16, 3, 4)
    network.layers[-1].weight.data.mul_(4)
    drawn = network(latent)
    assert drawn.min() < 0 and drawn.max() > 1
    image = preview(network, latent)
    assert image.shape == (2, 24, 32, 3) and image.dtype == torch.float32
    torch.testing.assert_close(image, mapped(drawn.clamp(0, 1)))
    half = preview(network.bfloat16(), latent)
    assert half.dtype == torch.float32 and 0 < (half - image).abs().mean() < 0.02


def test_values_that_are_not_finite_and_other_latents_are_refused():
    network = Previewer(SMALL)
    for bad in (torch.full((1, 16, 3, 3), float("nan")), torch.full((1, 16, 3, 3), float("inf"))):
        with pytest.raises(w.WuerstchenError, match="the previewer gave values that are not finite in float32"):
            preview(network, bad)
    with pytest.raises(w.WuerstchenError, match="for latents of 16 channels, not of 4$"):
        preview(network, noise(1, 4, 3, 3))
