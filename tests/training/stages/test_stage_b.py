"""The training of Stage B, by the command line and by its formulas."""

import numpy as np
import pytest
import torch
from PIL import Image

import wuerstchen_core as w
from tests.training.stages.tasks import DATA, task_b, train
from wuerstchen_core import cli
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.training.loop.draws import Draws
from wuerstchen_core.training.stages import stage_b
from wuerstchen_core.training.stages.conditioning import compressor_for, compressor_input


def test_stage_b_trains_alone_and_with_the_compressor(place, tiny_folder):
    train("b")
    assert w.load_stage_b("run/stage_b.safetensors").config.latent_space.scale == 2.0  # the compressor's
    with Image.open("run/samples/0000003.png") as grid:
        assert grid.size == (2 * 64 + 3 * 4, 2 * 64 + 3 * 4)
    train("b", "--folder", "both", "--semantic-compressor", "", "--train-compressor", "true")
    network = w.load_stage_b("both/stage_b.safetensors")
    compressor = w.load_semantic_compressor("both/semantic_compressor.safetensors")
    assert network.config.latent_space == compressor.config.latent_space
    assert compressor.config.stem == 8 and compressor.mapper[1].num_batches_tracked > 0
    train("b", "--folder", "silent", "--text-encoder", "", "--steps", "1")
    for arguments in (["--semantic-compressor", ""], ["--train-compressor", "true", "--cache", "cache"]):
        assert cli.main(["train", "stage-b", "--config", "b.toml", *arguments]) == 2


def test_a_compressor_begins_with_torchvisions_weights(tmp_path):
    from torchvision.models import efficientnet_v2_s

    torch.manual_seed(0)
    published = efficientnet_v2_s(num_classes=3)
    torch.save(published.state_dict(), tmp_path / "imagenet.pth")
    options = stage_b.Options(semantic_compressor="", train_compressor=True, backbone=str(tmp_path / "imagenet.pth"))
    compressor, _ = compressor_for("", options.compressor, options.backbone, trained=True)
    image = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = published.eval().features((image - mean[:, None, None]) / std[:, None, None])
    seen = []
    compressor.eval().backbone.register_forward_hook(lambda module, args, out: seen.append(out))
    compressor(image)
    torch.testing.assert_close(seen[0], expected)
    torch.save({"features.0.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(w.WuerstchenError, match="backbone: .*other.pth is not torchvision's"):
        stage_b.build(stage_b.Options(**{**vars(options), "backbone": str(tmp_path / "other.pth")}), DATA)


def test_the_compressor_learns_when_it_should(tiny_folder):
    for joint in (False, True):
        task = task_b(tiny_folder, train_compressor=joint, zeroed=0.0)
        batch = {"image": torch.rand(4, 3, 64, 64), "caption": ["a"] * 4}
        with torch.no_grad():
            batch["features"] = task.features(batch)
        sum(task(batch, Draws(0, 0, 4)).values()).backward()
        assert ("semantic" in batch["features"]) != joint
        trained = [name for name, parameter in task.named_parameters() if parameter.grad is not None]
        assert any(name.startswith("compressor.backbone") for name in trained) == joint
        assert task.exported().keys() == ({"stage_b", "semantic_compressor"} if joint else {"stage_b"})
        assert not any(parameter.requires_grad for network in task.frozen for parameter in network.parameters())


class Spy(torch.nn.Module):
    """In Stage B's place: keeps what it is given."""

    def __init__(self, network):
        super().__init__()
        self.config = network.config
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, semantic, text=None):
        self.given, self.t = (semantic, text), t
        return x * self.weight


def test_stage_bs_latents_and_captions_are_spoiled_as_often_as_the_paper_says(tiny_folder):
    task = task_b(tiny_folder)
    task.network = Spy(task.network)
    count = 3000
    clean = torch.full((count, 16, 2, 2), 3.5)
    text = torch.ones(count, 77, 32)
    features = {"semantic": clean, "text": text, "latent": torch.zeros(count, 4, 4, 4)}
    draws = Draws(0, 0, count)
    task({"features": features}, draws)
    semantic, read = task.network.given
    zeroed = (semantic == 0).flatten(1).all(dim=1)
    untouched = (semantic == clean).flatten(1).all(dim=1)
    noised = ~(zeroed | untouched)
    assert zeroed.float().mean().item() == pytest.approx(0.05, abs=0.012)
    assert noised.float().mean().item() == pytest.approx(0.30, abs=0.025)
    dropped = (read != 1).flatten(1).any(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.05, abs=0.012)
    both = (dropped & zeroed).float().mean().item()
    assert both < 0.01  # independent of each other
    again = Draws(0, 0, count)
    again.uniform()
    t = again.uniform().double() * 0.5
    noise = again.normal((16, 2, 2)).double()
    alpha = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    alpha = alpha.clamp(1e-4, 0.9999)[:, None, None, None]
    expected = (alpha.sqrt() * (3.5 + 0.5) / 2 + (1 - alpha).sqrt() * noise) * 2 - 0.5
    torch.testing.assert_close(semantic[noised].double(), expected[noised], rtol=1e-5, atol=1e-5)


def test_steps_without_text_are_without_it_for_all(tiny_folder):
    task = task_b(tiny_folder, text_absent=0.4)
    task.network = Spy(task.network)
    features = {"semantic": torch.ones(2, 16, 2, 2), "text": torch.ones(2, 77, 32), "latent": torch.zeros(2, 4, 4, 4)}
    absent = 0
    for step in range(300):
        task({"features": features}, Draws(0, step, 2))
        absent += task.network.given[1] is None
    assert absent / 300 == pytest.approx(0.4, abs=0.09)


def test_stage_b_sees_the_times_that_are_asked_for(tiny_folder):
    features = {"semantic": torch.ones(200, 16, 2, 2), "latent": torch.zeros(200, 4, 4, 4)}
    for share, lowest in ((0.0, 0.001), (1.0, 0.65 * 1.08 + 0.001)):
        task = task_b(tiny_folder, high_noise=share)
        task.network = Spy(task.network)
        task({"features": features}, Draws(0, 0, 200))
        assert task.network.t.min().item() == pytest.approx(lowest, abs=0.03)


def test_stage_b_sees_stage_as_latents(tiny_folder):
    task = task_b(tiny_folder)
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = task.features({"image": image, "caption": ["a", "b"]})
    torch.testing.assert_close(features["latent"], w.load_stage_a(tiny_folder / SET["stage_a"]).encode(image))
    raw = w.load_semantic_compressor(tiny_folder / SET["semantic_compressor"])(compressor_input(image))
    torch.testing.assert_close(features["semantic"], raw)


def test_a_new_stage_b_starts_as_the_released_ones_did(tiny_folder):
    """At first the noise told is x / b, whatever the condition: the output's weights are zero."""
    sizes = {"widths": (16, 32, 32, 32), "heads": (0, 2, 2, 2), "blocks": (1, 1, 1, 1)}
    config = StageBConfig(**sizes, condition_width=24, text_width=192)
    task = stage_b.build(stage_b.Options(network=config), DATA)
    x = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        told = [task.network(x, torch.tensor([t]), torch.randn(1, 16, 2, 2)) for t in (0.1, 0.9)]
    assert isinstance(task.network, DiffNeXt) and torch.equal(*told)
