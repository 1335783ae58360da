"""The linear preview against numpy, and the previewer's training."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import wuerstchen_core as w
from tests.conftest import SPACE
from tests.previewers import SMALL, mapped, noise, pictures
from wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW, MINI
from wuerstchen_core.cli import main
from wuerstchen_core.mini.emoji import EmojiSet
from wuerstchen_core.mini.linear_preview import linear_preview
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig
from wuerstchen_core.pipeline import compress, preview
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.stages.previewer import Options, build, fit_linear_preview, semantic, small

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
    with Image.open(MINI.parent / "samples.png") as sheet:
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


def test_shipped_configurations_name_known_options():
    from dataclasses import fields

    from wuerstchen_core.training.command import CONFIGS, RunOptions
    from wuerstchen_core.training.loop.run import Plan
    from wuerstchen_core.training.options import load, read_all

    classes = (RunOptions, DataOptions, Plan, Options)
    for name, config in (("mini", None), ("v2", PreviewerConfig())):
        table = load(str(CONFIGS / name / "previewer.toml"))
        assert set(table) <= {field.name for field in itertools.chain.from_iterable(map(fields, classes))}
        network = read_all(classes, table, name)[-1].network
        assert config is None or network == config
        Previewer(network)
