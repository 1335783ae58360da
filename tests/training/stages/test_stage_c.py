"""The training of Stage C, by the command line and by its formulas."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import wuerstchen_core as w
from tests.reference import fill_zeros
from tests.training.runs import logged
from tests.training.stages.tasks import task_c, train
from wuerstchen_core.checkpoints.sets import find_set
from wuerstchen_core.training.loop.draws import Draws
from wuerstchen_core.training.stages import stage_c


def test_two_processes_learn_as_one_with_the_doubled_batch(place):
    train("c", "--folder", "one")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m"]
    command = ["wuerstchen_core", "train", "stage-c", "--config=c.toml", "--folder=two", "--batch=2"]
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


def test_stage_c_is_trained_by_the_papers_formulas(tiny_folder):
    """Loss in float64 from the noise and times that the draws give; each caption serves both noise levels."""
    task = task_c(tiny_folder, noise_levels=2, p2_k=0.3, high_noise=0.4, caption_drop=0.5, largest_error=20.0)
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


def test_errors_are_limited_only_where_it_is_asked_for(tiny_folder):
    batch = {"features": {"semantic": torch.zeros(2, 16, 2, 2), "text": torch.zeros(2, 77, 32)}}
    for options, expected in (({}, 1e4), ({"largest_error": 20.0}, 20.0)):
        task = task_c(tiny_folder, p2_k=1e6, **options)
        task.network.denoise = lambda x, modulation, condition: torch.full_like(x, 100.0)
        assert task(batch, Draws(0, 0, 2))["noise"].item() * 1e6 == pytest.approx(expected, rel=0.05)
