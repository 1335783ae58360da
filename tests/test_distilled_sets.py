"""Sets with distilled networks: `generate` draws with them unless it is told how to sample."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import wuerstchen_core as w
from tests.loras import bits, distilled_set, same_bits
from wuerstchen_core import pipeline
from wuerstchen_core.checkpoints.sets import DISTILLED, find_distilled
from wuerstchen_core.cli import main
from wuerstchen_core.diffusion.options import STAGE_B, STAGE_C, SamplingOptions
from wuerstchen_core.models.defaults import SMALL as SMALL_SET

SMALL = {"width": 64, "height": 64}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return distilled_set(tiny_folder, tmp_path / "set")


def test_without_settings_the_distilled_networks_draw_and_all_stays_as_it_was(folder):
    pipe = w.Wuerstchen.from_folder(folder)
    before = bits(pipe.stage_c) | bits(pipe.stage_b)
    steps = []
    drawn = pipe.generate("a cat", seed=5, progress=lambda *step: steps.append(step), **SMALL)
    assert steps == [("Stage C", i, 3) for i in (1, 2, 3)] + [("Stage B", i, 2) for i in (1, 2)]

    loras = {stage: w.load_lora(path) for stage, path in find_distilled(folder).items()}
    few = SamplingOptions(steps=3, cfg=1.0, sampler="lcm", seed=5)
    text = pipe.text_encoder_c(["a cat"])
    geometry = w.Geometry(64, 64)
    with w.apply_loras(pipe.stage_c, [(loras["stage_c"], 1.0)]):
        latent = pipeline.sample_stage_c(pipe.stage_c, torch.zeros(1, 16, *geometry.stage_c), text, None, few)
    with w.apply_loras(pipe.stage_b, [(loras["stage_b"], 1.0)]):
        latent = pipeline.sample_stage_b(pipe.stage_b, latent, geometry, text, None, few, steps=2)
    assert torch.equal(drawn, pipeline.decode(pipe.stage_a, latent, geometry))
    assert same_bits(pipe.stage_c, {name: before[name] for name in pipe.stage_c.state_dict()})
    assert torch.equal(drawn, pipe.generate("a cat", seed=5, **SMALL))


@pytest.mark.parametrize(
    "given",
    [{"steps_c": STAGE_C.steps}, {"cfg_c": STAGE_C.cfg}, {"steps_b": STAGE_B.steps}, {"cfg_b": STAGE_B.cfg},
     {"sampler": STAGE_C.sampler}, {"schedule": STAGE_C.schedule}, {"schedule_b": STAGE_B.schedule},
     {"cfg_interval": (0.0, 1.0)}, {"cfg_rescale": 0.0}, {"negative_prompt": ""}],
)  # fmt: skip
def test_any_setting_is_followed_by_the_networks_as_they_are(folder, tiny, given):
    pipe = w.Wuerstchen.from_folder(folder)
    sampling = pipe.sampling(**given)
    stage_c = replace(STAGE_C, cfg=given.get("cfg_c", pipe.defaults.cfg))
    assert (sampling.stage_c, sampling.stage_b, sampling.distilled) == (stage_c, STAGE_B, {})
    if "steps_c" not in given:
        return
    few = {"steps_c": 2, "steps_b": 1}
    assert torch.equal(pipe.generate("a cat", **few, **SMALL), tiny.generate("a cat", **few, **SMALL))


def test_one_stage_alone_may_be_distilled(folder):
    (folder / DISTILLED["stage_b"]).unlink()
    sampling = w.Wuerstchen.from_folder(folder).sampling()
    assert sampling.stage_c == SamplingOptions(steps=3, cfg=1.0, sampler="lcm")
    assert sampling.stage_b == SMALL_SET.few_steps_b != STAGE_B
    assert sampling.distilled.keys() == {"stage_c"}


@pytest.mark.parametrize(
    "metadata, says",
    [
        (None, "does not say how to sample"),
        ({"cfg": 1.0}, "does not say how to sample"),
        ({"steps": 4, "colour": "red"}, "does not say how to sample"),
        ({"steps": 0}, "its sampling metadata: steps is 0"),
        ({"steps": 4, "sampler": "best"}, "its sampling metadata: unknown sampler"),
        ([4], "wuerstchen_sampling"),
    ],
)
def test_a_distilled_network_that_does_not_say_how_to_sample_is_named(folder, metadata, says):
    path = folder / DISTILLED["stage_c"]
    tensors = {f"prior.blocks.2.attention.to_q.lora_{half}.weight": torch.ones(shape)
               for half, shape in (("A", (2, 32)), ("B", (32, 2)))}  # fmt: skip
    save_file(tensors, path, None if metadata is None else {"wuerstchen_sampling": json.dumps(metadata)})
    with pytest.raises(w.WuerstchenError) as caught:
        w.Wuerstchen.from_folder(folder)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value) and "\n" not in str(caught.value)


def test_the_lora_of_another_stage_in_its_place_is_named(folder):
    shutil.copy(folder / DISTILLED["stage_b"], folder / DISTILLED["stage_c"])
    with pytest.raises(w.WuerstchenError, match="a LoRA for Stage B, and this is Stage C"):
        w.Wuerstchen.from_folder(folder)


def test_a_lora_for_stage_b_changes_stage_b(folder, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--steps-c", "2", "--steps-b", "1", "--width", "64", "--height", "64", "--model", str(folder)]
    assert main(["generate", "a cat", "--lora", f"{folder / DISTILLED['stage_b']}:0.5", *few]) == 0
    with w.apply_loras(tiny.stage_b, [(w.load_lora(folder / DISTILLED["stage_b"]), 0.5)]):
        expected = tiny.generate("a cat", steps_c=2, steps_b=1, **SMALL)[0]
    with Image.open("wuerstchen.png") as picture:
        assert torch.equal(torch.from_numpy(np.array(picture)), (expected * 255).round().byte())


@pytest.mark.parametrize(
    "arguments, distilled",
    [
        ("", True),
        ("--steps-c 2", False),
        ("--negative dog", False),
        ("--no-distilled", False),
        ("--lora style.safetensors", False),
        ("--distilled --steps-c 2 --sampler-b ddim", True),
    ],
)
def test_the_command_line_draws_by_distilled_networks(folder, tmp_path, monkeypatch, capsys, arguments, distilled):
    """Where nothing else is asked for; its record and its graph say so, and it is drawn again from them."""
    arguments = arguments.split()
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / DISTILLED["stage_c"], "style.safetensors")
    assert main(["generate", "a cat", *arguments, "--width", "64", "--height", "64", "--model", "set"]) == 0
    with Image.open("wuerstchen.png") as picture:
        drawn = np.array(picture)
        told, graph = (json.loads(picture.text[name]) for name in ("wuerstchen", "prompt"))
    assert told.get("distilled") == (["stage_c", "stage_b"] if distilled else None)
    files = [node["inputs"]["file"] for node in graph.values() if node["class_type"] == "WuerstchenLoadLoRA"]
    assert [file for file in files if file.startswith("set: ")] == [
        f"set: few steps (Stage {stage})" for stage in "CB" * distilled
    ]
    pipe = w.Wuerstchen.from_folder(folder)
    if not distilled and "style.safetensors" not in arguments:
        options = {"steps_c": 2} if "2" in arguments else {"negative_prompt": "dog" if "dog" in arguments else ""}
        expected = pipe.generate("a cat", **SMALL, **options, distilled=False)[0]
        assert np.array_equal(drawn, (expected * 255).round().byte().numpy())
    if "ddim" in arguments:
        expected = pipe.generate("a cat", **SMALL, steps_c=2, sampler_b="ddim", distilled=True)[0]
        assert np.array_equal(drawn, (expected * 255).round().byte().numpy())
    capsys.readouterr()
    assert main(["generate", "--from", "wuerstchen.png", "-o", "again.png"]) == 0
    assert ("--distilled" in capsys.readouterr().out.splitlines()[0]) == distilled
    with Image.open("again.png") as picture:
        assert np.array_equal(drawn, np.array(picture))


def test_distilled_networks_that_are_not_there(tiny_folder, capsys):
    assert main(["generate", "a cat", "--distilled", "--model", str(tiny_folder)]) == 2
    assert "has no distilled networks" in capsys.readouterr().err
