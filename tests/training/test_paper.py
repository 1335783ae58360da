"""The paper's own settings (appendix E), one configuration for each of its parts, and its baseline."""

import dataclasses

import pytest
import torch

import wuerstchen_core as w
from tests.training.stages.conftest import place  # noqa: F401, a fixture
from tests.training.stages.tasks import task_b
from tests.training.test_options import classes, flat, values
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.training import command
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.options import listed, load

PARTS = [  # stage, configuration, GPUs, the batch of all together, pixels a side, steps
    ("stage-a", "paper", 8, 256, 256, 500_000),
    ("stage-b", "paper", 64, 512, 512, 457_000),
    ("stage-b", "paper-2", 64, 128, 1024, 300_000),
    ("stage-c", "paper", 64, 1536, 512, 500_000),
    ("stage-c", "paper-2", 64, 1536, 1024, 364_000),
    ("stage-c", "paper-3", 64, 1536, 1024, 4_000),
    ("stage-c", "paper-4", 64, 384, 1024, 50_000),
]
FILES = [(command.STAGES[stage][0], name) for stage, name, *_ in PARTS] + [("stage_b", "baseline")]


def table_of(stage, name):
    return load(str(command.CONFIGS / name / f"{stage.replace('-', '_')}.toml"))


@pytest.mark.parametrize("stage, name, gpus, batch, side, steps", PARTS)
def test_parts_have_the_papers_sizes(stage, name, gpus, batch, side, steps):
    given = values(stage, table_of(stage, name))
    assert (given["batch"] * gpus * given["accumulate"], given["size"], given["steps"]) == (batch, side, steps)
    assert f"batch {batch} on {gpus} GPUs" in (command.CONFIGS / name / f"{stage.replace('-', '_')}.toml").read_text()
    if stage == "stage-c" and name == "paper":
        sizes = {field: given[f"network.{field}"] for field in ("width", "depth", "heads", "text_width")}
        assert sizes == {"width": 1280, "depth": 16, "heads": 16, "text_width": 1024}
        assert w.Geometry(side, side).stage_c == (12, 12)
    if stage == "stage-a":
        weights = {loss: given[loss] for loss in ("l1", "mse", "perceptual", "adversarial")}
        assert weights == {"l1": 0, "mse": 1, "perceptual": 0.1, "adversarial": 0.01}
        assert (given["adversarial_start"], given["crop"], given["continuous"]) == (10_000, 128, 0.1)


@pytest.mark.parametrize("stage, name", FILES)
def test_configurations_hold_what_differs_from_the_defaults(stage, name):
    path = command.CONFIGS / name / f"{stage}.toml"
    table, stage = load(str(path)), stage.replace("_", "-")
    given = values(stage, table)
    defaults = {option: default for option, _, default, _ in listed(*classes(stage))}
    for option, _ in flat(table):
        assert given[option] != defaults[option] or option == "network.dropout", option
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 120


LEVELS = {"widths": (16, 32, 32, 32), "heads": (0, 2, 2, 2), "blocks": (1, 1, 1, 1)}
SMALL = {
    "stage-a": {"crop": 16, "perceptual_weights": "", "lpips_weights": "", "adversarial_start": 0,
                "discriminator_width": 8, "discriminator_layers": 1,
                "network": {"widths": (8, 16), "bottleneck_blocks": 1, "codebook_size": 16}},
    "stage-b": {"network": {**LEVELS, "condition_width": 24, "text_width": 32}, "backbone": "",
                "compressor": {"stem": 8, "stages": ((True, 1, 2, 8, 1),) * 4, "features": 16}},
    "stage-c": {"network": {"width": 32, "depth": 1, "heads": 2, "text_width": 32}, "prompts": ()},
}  # fmt: skip


def test_the_parts_run_one_after_another(place, tiny_folder):  # noqa: F811
    """At a reduced size, each from the files of those before it, which are where the configurations expect them."""
    for stage, name, *_ in PARTS:
        few = {"data": "pictures", "size": 64, "batch": 2, "workers": 0, "steps": 1, "sample_every": 0}
        few |= {"mixed_precision": "no", "ema_every": 1}
        if stage != "stage-a":
            few["text_encoder"] = str(tiny_folder / SET["text_encoder_c"])
        w.train(stage, config=name, **few, **SMALL[stage])
    network = w.load_stage_c("runs/paper-4/stage_c/stage_c.safetensors")
    assert network.config.width == 32
    assert w.load_stage_b("runs/paper-2/stage_b/stage_b.safetensors").config.widths == (16, 32, 32, 32)
    assert w.load_semantic_compressor("runs/paper-2/stage_b/semantic_compressor.safetensors").config.stem == 8


def test_the_baseline_is_the_minis_stage_b_without_semantic_latents():
    ours, minis = (command.configured("stage-b", name) for name in ("baseline", "mini"))
    changed = {"semantic": (False,) * 4, "text_absent": False}
    assert ours.network == dataclasses.replace(minis.network, **changed) and any(minis.network.semantic)
    assert ours == dataclasses.replace(minis, network=ours.network, text_absent=0.0, compressor=ours.compressor)


def test_the_baseline_learns_from_text_alone(place, tiny_folder):  # noqa: F811
    names = {"text_encoder": "text_encoder_c", "semantic_compressor": "semantic_compressor", "stage_a": "stage_a"}
    given = {name: str(tiny_folder / SET[role]) for name, role in names.items()}
    few = {"data": "pictures", "size": 64, "batch": 2, "workers": 0, "steps": 2, "ema_every": 1, "sample_every": 2}
    few["network"] = {**LEVELS, "text_width": 32}
    w.train("stage-b", config="baseline", folder="run", **few, **given, sample_count=2, sample_steps=2)
    network = w.load_stage_b("run/stage_b.safetensors")
    assert not any("effnet" in name or "semantic" in name for name in network.state_dict())
    with torch.inference_mode():
        for parameter in network.parameters():
            parameter.data.add_(0.02)
        x, t, text = torch.randn(1, 4, 16, 16), torch.tensor([0.5]), torch.randn(2, 1, 7, 32)
        told = [network(x, t, torch.randn(1, 16, 2, 2), text[0]) for _ in range(2)]
        assert torch.equal(*told) and not torch.allclose(told[0], network(x, t, torch.zeros(1, 16, 2, 2), text[1]))
    with pytest.raises(w.WuerstchenError, match="train_compressor: this Stage B reads no semantic latent"):
        w.train("stage-b", config="baseline", folder="other", train_compressor=True, **few, **given)
    with pytest.raises(w.WuerstchenError, match="text_encoder is empty, and this Stage B reads no semantic latent"):
        w.train("stage-b", config="baseline", folder="other", **few, **given | {"text_encoder": ""})


def test_stage_bs_samples_are_drawn_with_their_captions(place, tiny_folder):  # noqa: F811
    task = task_b(tiny_folder, sample_count=2, sample_steps=2)
    task.data = DataOptions(data="pictures", size=64)
    drawn = task.samples()
    assert all(caption.startswith("number ") for caption in task.captions)
    task.captions = ["something else"] * 2
    again = task.samples()
    assert torch.equal(drawn[::2], again[::2]) and not torch.equal(drawn[1::2], again[1::2])
