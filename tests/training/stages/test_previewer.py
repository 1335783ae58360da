"""The previewer's training, and the linear previewer that ships."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import wuerstchen_core as w
from tests.conftest import SPACE
from tests.previewers import SMALL, mapped, pictures
from wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW, MINI
from wuerstchen_core.cli import main
from wuerstchen_core.mini.emoji import EmojiSet
from wuerstchen_core.models.latent_space import LatentSpace
from wuerstchen_core.models.previewer import Previewer, PreviewerConfig
from wuerstchen_core.models.semantic_compressor import BackboneStage, SemanticCompressorConfig
from wuerstchen_core.pipeline import compress, preview
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.loop.draws import Draws
from wuerstchen_core.training.stages.conditioning import compressor_input
from wuerstchen_core.training.stages.previewer import Options, build, semantic, small


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
    from wuerstchen_core.training.loop.plan import Plan
    from wuerstchen_core.training.options import load, read_all

    classes = (RunOptions, DataOptions, Plan, Options)
    for name, config in (("mini", None), ("v2", PreviewerConfig())):
        table = load(str(CONFIGS / name / "previewer.toml"))
        assert set(table) <= {field.name for field in itertools.chain.from_iterable(map(fields, classes))}
        network = read_all(classes, table, name)[-1].network
        assert config is None or network == config
        Previewer(network)


SMALL_COMPRESSOR = SemanticCompressorConfig(
    stem=8,
    stages=(BackboneStage(True, 1, 2, 8, 1),) * 4,
    features=16,
    latent_space=LatentSpace(0.5, 2.0),
)


def test_a_compressor_is_trained_with_it(data_options):
    """The loss is that of the small picture drawn from the compressor's latent in Stage C's space, with its noise."""
    asked = {"semantic_compressor": "", "train_compressor": True, "compressor": SMALL_COMPRESSOR, "network": SMALL}
    task = build(Options(**asked, latent_noise=0.3), data_options).eval()
    image = pictures(64, 128)
    features = task.features({"image": image, "caption": ["", ""]})
    assert features.keys() == {"small"} and not task.feature_files and not task.frozen
    loss = task({"image": image, "features": features}, Draws(1, 2, 2))["picture"]
    latent = (task.compressor(compressor_input(image)) + 0.5) / 2 + 0.3 * Draws(1, 2, 2).normal((16, 2, 3))
    expected = (task.network(latent) - small(image)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in task.compressor.parameters())
    assert task.exported().keys() == {"previewer", "semantic_compressor"}


def test_a_trained_compressor_loads_and_goes_on(emoji, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = [
        "--compressor.stem",
        "8",
        "--compressor.stages",
        "[[true,1,2,8,1],[true,1,2,8,1],[true,1,2,8,1],[true,1,2,8,1]]",
    ]
    arguments = ["train", "previewer", "--config", "mini", "--data", str(emoji), "--workers", "0", "--batch", "2",
                 "--train-compressor", "true", "--sample-every", "0", "--network.widths", "[8, 8, 4, 4]",
                 "--semantic-compressor"]  # fmt: skip
    assert main([*arguments, "", "--steps", "2", *tiny, "--compressor.features", "16"]) == 0, capsys.readouterr().err
    first = w.load_semantic_compressor("runs/previewer/semantic_compressor.safetensors")
    assert first.config.stem == 8 and first.config.features == 16
    more = ["runs/previewer/semantic_compressor.safetensors", "--steps", "1", "--folder", "on"]
    assert main([*arguments, *more]) == 0, capsys.readouterr().err
    second = w.load_semantic_compressor("on/semantic_compressor.safetensors")
    assert second.config == first.config and not torch.equal(second.mapper[0].weight, first.mapper[0].weight)


@pytest.mark.parametrize("asked, told", [
    ({"semantic_compressor": ""}, "semantic_compressor: name a file, or train a new one"),
    ({"latent_noise": 0.1}, "latent_noise is for a compressor that is trained"),
    ({"latent_noise": -1.0, "train_compressor": True}, "latent_noise is -1"),
])  # fmt: skip
def test_options_of_the_compressor_that_contradict(asked, told):
    with pytest.raises(w.WuerstchenError, match=told):
        Options(**asked)
