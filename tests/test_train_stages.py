"""The training of Stages B and C, by the command line and by its formulas."""

import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import wuerstchen_core as w
from tests.reference import fill_zeros
from tests.training_runs import logged
from wuerstchen_core import cli
from wuerstchen_core.checkpoints.files import SET, find_set
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.training import stage_b, stage_c
from wuerstchen_core.training.conditioning import compressor_input, encode_captions
from wuerstchen_core.training.data_options import DataOptions
from wuerstchen_core.training.draws import Draws

TINY_C = """
folder = "run"
data = "pictures"
size = 64
batch = 4
workers = 0
buckets = false
steps = 8
warm_up = 3
learning_rate = 1e-3
save_every = 4
sample_every = 0
log_every = 1
ema_every = 2

[network]
width = 32
depth = 1
heads = 2
text_width = 32
"""
TINY_B = """
folder = "run"
data = "pictures"
size = 64
batch = 2
workers = 0
steps = 3
warm_up = 3
save_every = 3
sample_every = 3
sample_count = 2
sample_steps = 2
log_every = 1
ema_every = 1
text_absent = 0.5

[network]
widths = [16, 32, 32, 32]
heads = [0, 2, 2, 2]
blocks = [1, 1, 1, 1]
condition_width = 24
text_width = 32

[compressor]
stem = 8
stages = [[true, 1, 2, 8, 1], [true, 1, 2, 8, 1], [true, 1, 2, 8, 1], [true, 1, 2, 8, 1]]
features = 16
"""


@pytest.fixture
def place(tmp_path, tiny_folder, monkeypatch):
    """The present folder: pictures, configurations, and the tiny set as the weights."""
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        size = [(64, 64), (64, 128), (128, 64)][number % 3]
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"pictures/{number:02}.png")
        (tmp_path / f"pictures/{number:02}.txt").write_text(f"number {number} (grey)")
    names = {role: (tiny_folder / name).as_posix() for role, name in SET.items()}
    encoder, compressor = f'text_encoder = "{names["text_encoder_c"]}"\n', names["semantic_compressor"]
    frozen = encoder + f'semantic_compressor = "{compressor}"\nstage_a = "{names["stage_a"]}"\n'
    (tmp_path / "c.toml").write_text(frozen + f'stage_b = "{names["stage_b"]}"\n' + TINY_C)
    (tmp_path / "b.toml").write_text(frozen + TINY_B)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(stage, *arguments):
    assert cli.main(["train", f"stage-{stage}", "--config", f"{stage}.toml", *arguments]) == 0


ROLES = [(role, role) for role in ("semantic_compressor", "stage_a", "stage_b")]
DATA = DataOptions(data="pictures", size=64)


def task_c(tiny_folder, **options):
    names = {name: str(tiny_folder / SET[role]) for name, role in (("text_encoder", "text_encoder_c"), *ROLES)}
    return stage_c.build(stage_c.Options(**{**names, "init": str(tiny_folder / SET["stage_c"]), **options}), DATA)


def task_b(tiny_folder, **options):
    names = {name: str(tiny_folder / SET[role]) for name, role in (("text_encoder", "text_encoder_c"), *ROLES)}
    del names["stage_b"]
    return stage_b.build(stage_b.Options(**{**names, "init": str(tiny_folder / SET["stage_b"]), **options}), DATA)


def test_two_processes_learn_as_one_with_the_doubled_batch(place):
    train("c", "--folder", "one")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m"]
    command = ["wuerstchen_core.cli", "train", "stage-c", "--config=c.toml", "--folder=two", "--batch=2"]
    root = os.path.dirname(os.path.dirname(w.__file__))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = logged("one"), logged("two")
    assert one.keys() == two.keys() and sorted(two["loss/noise"]) == list(range(1, 9))
    for tag, steps in one.items():
        for step, values in steps.items():
            assert two[tag][step] == pytest.approx(values, rel=1e-5), (tag, step)
    assert len(set(map(tuple, one["loss/noise"].values()))) == 8
    for ours, theirs in zip(w.load_stage_c("two/stage_c.safetensors").parameters(),
                            w.load_stage_c("one/stage_c.safetensors").parameters()):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)  # AdamW makes much of tiny gradients


def test_features_from_a_cache_and_a_resumed_run_change_no_loss(place, monkeypatch):
    train("c", "--folder", "whole")
    train("c", "--folder", "cached", "--cache", "cache", "--steps", "4")
    count = 0
    features = stage_c.StageCTask.features

    def counted(task, batch):
        nonlocal count
        count += 1
        return features(task, batch)

    monkeypatch.setattr(stage_c.StageCTask, "features", counted)
    train("c", "--folder", "cached", "--cache", "cache")
    assert count == 0  # 12 pictures in batches of 4: all of them were seen
    assert logged("cached") == logged("whole")
    train("c", "--folder", "plain", "--steps", "2")
    assert count == 2


def test_what_is_trained_loads_and_draws(place, tiny_folder):
    train("c", "--sample-every", "8", "--sample-steps", "2", "--prompts", '["a disc", "a square"]')
    names = find_set(tiny_folder)
    pipe = w.Wuerstchen.from_files(**{**names, "stage_c": "run/stage_c.safetensors"})
    assert pipe.generate("a disc", width=64, height=64, steps_c=2, steps_b=2).shape == (1, 64, 64, 3)
    state = torch.load("run/checkpoint.pt", weights_only=True)
    for name, tensor in w.load_stage_c("run/stage_c.safetensors").state_dict().items():
        assert torch.equal(tensor, state["averaged"][f"network.{name}"])
        assert tensor.dtype == torch.float32
    with Image.open("run/samples/0000008.png") as grid:
        assert grid.size == (2 * 64 + 3 * 4, 64 + 2 * 4)
    images = [tag for path in (place / "run" / "logs").iterdir() for tag in _image_tags(path)]
    assert images == ["samples"]
    train("c", "--folder", "half", "--steps", "1", "--dtype", "float16")
    assert w.load_stage_c("half/stage_c.safetensors", dtype=None).projection.weight.dtype == torch.float16


def _image_tags(path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = EventFileLoader(str(path)).Load()
    return [v.tag for e in events for v in e.summary.value if v.metadata.plugin_data.plugin_name == "images"]


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
    compressor, _ = stage_b._compressor(options)
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


def test_stage_c_is_trained_by_the_papers_formulas(tiny_folder):
    """Loss in float64 from the noise and times that the draws give; each caption serves both noise levels."""
    task = task_c(tiny_folder, noise_levels=2, p2_k=0.3, high_noise=0.4, caption_drop=0.5)
    batch = {"image": torch.rand(6, 3, 64, 128), "caption": ["one", "two (2)", "", "four", "five", "six"]}
    with torch.no_grad():
        batch["features"] = features = task.features(batch)
        loss = task(batch, Draws(3, 5, 6))["noise"].item()
    encoder, compressor = task.frozen
    small = F.interpolate(batch["image"], size=(2 * 32, 3 * 32), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(features["semantic"], (compressor(small) + 0.5) / 2.0)
    torch.testing.assert_close(features["text"][:1], encoder(["one"]))
    torch.testing.assert_close(features["text"][1:2], encoder([r"two \(2\)"]))
    draws = Draws(3, 5, 6)
    dropped = draws.uniform() < 0.5
    assert 0 < dropped.sum() < 6
    text = [encoder([""])[0] if drop else own for own, drop in zip(features["text"], dropped)]
    uniform = draws.uniform(2).double()  # 0.4 of it from the first 0.35 alone, 0.6 from all
    uniform = torch.where(uniform < 0.61, uniform / 0.61 * 0.35, 1 - (1 - uniform) / 0.6)
    t = ((1 - uniform) * 1.08 + 0.001).clamp(0.001, 1)
    noise = draws.normal((2, 16, 2, 3)).double()
    s = 0.008
    alpha = (torch.cos((t + s) / (1 + s) * torch.pi / 2) ** 2 / np.cos(s / (1 + s) * np.pi / 2) ** 2).clamp(
        1e-4, 0.9999
    )
    total = 0.0
    for i in range(6):
        for level in range(2):
            a = alpha[i, level]
            x = a.sqrt() * features["semantic"][i].double() + (1 - a).sqrt() * noise[i, level]
            with torch.no_grad():
                told = task.network(x[None].float(), t[i, level, None].float(), text[i][None])[0]
            error = min((told.double() - noise[i, level]).square().mean().item(), 20.0)
            total += error / (0.3 + (a / (1 - a)).item()) / 12
    assert loss == pytest.approx(total, rel=1e-4)


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


def test_fine_tuning_starts_at_the_published_weights(tmp_path, place):
    """A Stage C in diffusers' layout: what is exported at a rate of nearly zero is it."""
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    torch.manual_seed(1)
    theirs = WuerstchenPrior(c_in=16, c=64, c_cond=32, c_r=64, depth=2, nhead=1)
    fill_zeros(theirs).save_pretrained(tmp_path / "prior")
    before = w.load_stage_c(tmp_path / "prior")
    train("c", "--init", str(tmp_path / "prior"), "--steps", "1", "--learning-rate", "1e-12", "--weight-decay", "0")
    after = w.load_stage_c("run/stage_c.safetensors")
    assert after.config == before.config and after.config.depth == 2
    for ours, published in zip(after.parameters(), before.parameters()):
        torch.testing.assert_close(ours, published, rtol=0, atol=1e-6)
    train("c", "--init", str(tmp_path / "prior"), "--steps", "3", "--folder", "tuned")
    moved = w.load_stage_c("tuned/stage_c.safetensors")
    assert not torch.equal(moved.projection.weight, before.projection.weight)
    assert torch.equal(w.load_stage_c(tmp_path / "prior").projection.weight, before.projection.weight)


def test_networks_that_do_not_fit_together_are_named(place, tiny_folder, capsys):
    for arguments, told in (
        (["--network.text-width", "48"], "text_encoder: .* width 32, but this Stage C reads 48"),
        (["--size", "100"], "size is 100: it must be a multiple of 64"),
        (["--noise-levels", "0"], "noise_levels and sample_steps must be at least 1"),
        (["--semantic-compressor", "gone.safetensors"], "semantic_compressor: there is no gone.safetensors"),
    ):
        assert cli.main(["train", "stage-c", "--config", "c.toml", *arguments]) == 2
        assert re.search(told, capsys.readouterr().err)
    assert cli.main(["train", "stage-b", "--config", "b.toml", "--zeroed", "0.8"]) == 2
    assert "together 1 at most" in capsys.readouterr().err


def test_an_unreadable_shard_is_named_and_passed_over(place, capsys, caplog):
    with tarfile.open("good.tar", "w") as tar:
        for path in sorted((place / "pictures").iterdir()):
            tar.add(path, path.name)
    (place / "bad.tar").write_bytes(b"not a tar file" * 100)
    train("c", "--data", "{good,bad}.tar", "--steps", "3")
    assert any("bad.tar" in record.message for record in caplog.records)
    assert cli.main(["train", "stage-c", "--config", "c.toml", "--data", "bad.tar", "--folder", "none"]) == 2
    assert "bad.tar" in capsys.readouterr().err


def test_long_captions_are_cut_and_parentheses_read():
    encoder = w.Wuerstchen.mini().text_encoder_c
    long = encode_captions(encoder, ["a " * 200, "b"])
    assert long.shape == (2, 77, encoder.config.width)
    torch.testing.assert_close(long[1:], encode_captions(encoder, ["b"]), rtol=1e-4, atol=1e-5)


def test_a_new_stage_b_starts_as_the_released_ones_did(tiny_folder):
    """At first the noise told is x / b, whatever the condition: the output's weights are zero."""
    sizes = {"widths": (16, 32, 32, 32), "heads": (0, 2, 2, 2), "blocks": (1, 1, 1, 1)}
    config = StageBConfig(**sizes, condition_width=24, text_width=192)
    task = stage_b.build(stage_b.Options(network=config), DATA)
    x = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        told = [task.network(x, torch.tensor([t]), torch.randn(1, 16, 2, 2)) for t in (0.1, 0.9)]
    assert isinstance(task.network, DiffNeXt) and torch.equal(*told)
