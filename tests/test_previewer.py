"""The previewer: sizes, its file, the linear one against numpy, its training, and the one that is shipped."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import wuerstchen_core as w
from tests.conftest import SPACE
from wuerstchen_core.checkpoints.files import METADATA_KEY, describe, find_set
from wuerstchen_core.cli import main
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig
from wuerstchen_core.pipeline import LINEAR_PREVIEW, MINI, compress, preview
from wuerstchen_core.training.data_options import DataOptions
from wuerstchen_core.training.emoji import EmojiSet
from wuerstchen_core.training.previewer import (
    Options,
    build,
    fit_linear_preview,
    linear_preview,
    semantic,
    small,
)

SMALL = PreviewerConfig(widths=(16, 8, 8, 4))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def pictures(height, width, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(4))


def mapped(image):
    return image.permute(0, 2, 3, 1)


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


# The linear preview


def test_the_linear_preview_is_numpys_least_squares():
    """Against numpy on all pixels of the pictures; latents whose channels have offsets and very different scales."""
    scale, offset = 10.0 ** torch.linspace(-2, 2, 16), torch.linspace(-5, 5, 16)
    latents = noise(7, 16, 3, 4) * scale[:, None, None] + offset[:, None, None]
    targets = pictures(24, 32, batch=7) ** 2
    fitted = fit_linear_preview(latents, targets)
    rows = latents.double().repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    rows = rows.permute(0, 2, 3, 1).reshape(-1, 16).numpy()
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    colours = mapped(targets).reshape(-1, 3).double().numpy()
    expected = np.linalg.lstsq(rows, colours, rcond=None)[0]
    ours = np.concatenate([fitted.layers[0].weight[:, :, 0, 0].numpy().T, fitted.layers[0].bias[None].numpy()])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert not fitted.training and fitted.config == PreviewerConfig(widths=())


def test_the_linear_preview_finds_a_linear_truth_from_few_positions_too():
    truth = Previewer(PreviewerConfig(widths=())).requires_grad_(False)
    latents = noise(5, 16, 6, 6)
    fitted = fit_linear_preview(latents, truth(latents))
    torch.testing.assert_close(fitted.state_dict(), truth.state_dict(), rtol=1e-4, atol=1e-5)
    few = latents[:1, :, :2, :2]  # 4 positions for 17 unknowns
    torch.testing.assert_close(fit_linear_preview(few, truth(few))(few), truth(few), rtol=1e-4, atol=1e-4)


def test_the_emojis_linear_preview_is_the_fit_of_pictures_and_their_latents(emoji, tiny):
    data, generator = EmojiSet(emoji), random.Random(5)
    images = torch.stack([data.draw(generator.randrange(6), generator)[0] for _ in range(9)])
    latents = compress(tiny.semantic_compressor, mapped(images))
    expected = fit_linear_preview(latents, small(images))
    fitted = linear_preview(data, tiny.semantic_compressor, count=9, seed=5)
    torch.testing.assert_close(fitted(latents), expected(latents), rtol=1e-3, atol=1e-3)


def test_the_shipped_linear_preview_belongs_to_the_mini():
    """It draws what the sheet of samples shows, nearly as well as a colour a position can."""
    previewer = w.load_previewer(LINEAR_PREVIEW)
    assert previewer.config == PreviewerConfig(widths=())
    compressor = w.load_semantic_compressor(MINI / "semantic_compressor.safetensors")
    with Image.open(MINI / "samples.png") as sheet:
        tiles = [np.array(sheet.crop((x, 0, x + 256, 256)).convert("RGB")) for x in (0, 256, 512, 768)]
    images = torch.from_numpy(np.stack(tiles)).float() / 255
    target = small(images.permute(0, 3, 1, 2))
    best = F.interpolate(F.avg_pool2d(target, 8), scale_factor=8)
    drawn = preview(previewer, compress(compressor, images)).permute(0, 3, 1, 2)
    assert F.mse_loss(drawn, best) < 0.1 * F.mse_loss(best, best.mean(dim=(2, 3), keepdim=True).expand_as(best))


# Training


@pytest.fixture
def data_options(emoji):
    return DataOptions(data=str(emoji), size=256, batch=4, workers=0)


def options(tiny_folder, **more):
    compressor = str(tiny_folder / "semantic_compressor.safetensors")
    return Options(**{"semantic_compressor": compressor, "network": SMALL, "sample_count": 2, **more})


def test_it_learns_from_latents_in_stage_cs_space(tiny_folder, tiny, data_options):
    """The compressor of these networks has a latent space of its own, unlike its raw features."""
    assert SPACE.scale != 1
    task = build(options(tiny_folder), data_options)
    image = pictures(192, 320)
    with torch.no_grad():
        features = task.features({"image": image, "caption": ["", ""]})
    torch.testing.assert_close(features["semantic"], compress(tiny.semantic_compressor, mapped(image)))
    assert features["semantic"].shape == (2, 16, 5, 8) and features["small"].shape == (2, 3, 40, 64)
    expected = F.interpolate(image, size=(40, 64), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(features["small"], expected)
    losses = task({"features": features}, None)
    drawn = task.network(features["semantic"])
    assert losses.keys() == {"picture"}
    assert losses["picture"].item() == pytest.approx((drawn - expected).square().mean().item(), rel=1e-5)
    assert {name.split(".")[0] for name in task.state_dict()} == {"network"}


def test_samples_are_pictures_beside_their_previews(tiny_folder, data_options):
    task = build(options(tiny_folder), data_options)
    shown = task.samples()
    assert shown.shape == (4, 48, 48, 3) and torch.equal(shown, task.samples())
    latent = semantic(task.frozen[0], task.pictures[0])
    torch.testing.assert_close(shown[0::2], mapped(small(task.pictures[0])))
    torch.testing.assert_close(shown[1::2], preview(task.network, latent))
    assert build(options(tiny_folder, sample_count=0), data_options).samples() is None


def test_it_goes_on_from_a_previewer(tiny_folder, data_options, tmp_path):
    network = Previewer(PreviewerConfig(widths=(8, 8, 4, 4)))
    w.save(network, tmp_path / "p.safetensors")
    task = build(options(tiny_folder, init=str(tmp_path / "p.safetensors")), data_options)
    assert task.network.config == network.config
    torch.testing.assert_close(task.network.state_dict(), network.state_dict())
    assert all(parameter.requires_grad for parameter in task.network.parameters())


def test_what_does_not_fit_is_refused(tiny_folder, data_options):
    with pytest.raises(w.WuerstchenError, match="semantic_compressor: its latents have 16 channels, and .* for 12"):
        build(options(tiny_folder, network=PreviewerConfig(12)), data_options)
    with pytest.raises(w.WuerstchenError, match="sample_count is -1"):
        options(tiny_folder, sample_count=-1)
    with pytest.raises(w.WuerstchenError, match="semantic_compressor: there is no nowhere.pt"):
        build(Options(semantic_compressor="nowhere.pt"), data_options)


def test_the_command_trains_a_previewer_that_has_learned(emoji, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [
        "--data", str(emoji), "--folder", str(folder), "--workers", "0", "--batch", "4", "--steps", "50",
        "--warm-up", "5", "--ema-every", "1", "--ema-decay", "0.8", "--sample-every", "50", "--learning-rate", "0.02",
        "--network.widths", "[16, 16, 8, 8]", "--cache", "",
    ]  # fmt: skip
    assert main(["train", "previewer", "--config", "mini", *arguments]) == 0, capsys.readouterr().err
    trained = w.load_previewer(folder / "previewer.safetensors")
    assert trained.config.widths == (16, 16, 8, 8)
    compressor = w.load_semantic_compressor(MINI / "semantic_compressor.safetensors")
    images = torch.stack([EmojiSet(emoji).plain(i) for i in range(6)])
    drawn = preview(trained, compress(compressor, mapped(images))).permute(0, 3, 1, 2)
    target = small(images)
    assert F.mse_loss(drawn, target) < 0.5 * target.var(dim=(0, 2, 3), correction=0).mean()
    assert len(list((folder / "samples").glob("*.png"))) == 1


def test_shipped_configurations_name_every_option():
    from dataclasses import fields

    from wuerstchen_core.training.command import CONFIGS, RunOptions
    from wuerstchen_core.training.options import load, read_all
    from wuerstchen_core.training.run import Plan

    classes = (RunOptions, DataOptions, Plan, Options)
    for name, config in (("mini", None), ("v2", PreviewerConfig())):
        table = load(str(CONFIGS / name / "previewer.toml"))
        assert set(table) == {field.name for field in itertools.chain.from_iterable(map(fields, classes))}
        network = read_all(classes, table, name)[-1].network
        assert config is None or network == config
        Previewer(network)
