"""wuerstchen generate: its pictures, its networks from files, and what is wrong with its options."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import wuerstchen_core as w
from wuerstchen_core import save
from wuerstchen_core.checkpoints.sets import MINI, SET
from wuerstchen_core.cli import main

FEW = ["--steps-c", "2", "--steps-b", "2"]


def settings_of(path):
    with Image.open(path) as picture:
        return json.loads(picture.text["wuerstchen"])


@pytest.fixture
def generate(tiny_folder):
    return lambda *arguments: main(["generate", *arguments, *FEW, "--model", str(tiny_folder)])


def test_a_picture_is_what_generate_returns_and_carries_how_it_was_made(generate, tiny, tiny_folder, capsys):
    assert generate("a pizza, 🍕", "-o", "p.png", "--seed", "7", "--negative", "cheese", "--width", "264") == 0
    assert capsys.readouterr().out == "p.png\n"
    expected = tiny.generate("a pizza, 🍕", negative_prompt="cheese", seed=7, width=264, steps_c=2, steps_b=2)[0]
    with Image.open("p.png") as picture:
        assert picture.size == (264, 256)
        assert np.array_equal(np.array(picture), (expected * 255).round().byte().numpy())
        assert set(picture.text) == {"wuerstchen", "Description", "prompt", "workflow"}
        assert picture.text["Description"].startswith("a pizza, 🍕\nnegative_prompt: cheese\n")
        told = json.loads(picture.text["wuerstchen"])
    again = {"negative_prompt": "cheese", "seed": 7, "steps_c": 2, "cfg_c": 2.0, "steps_b": 2, "cfg_b": 1.0}
    again |= {"width": 264, "height": 256, "batch_size": 1, "sampler": "dpmpp_2m_sde", "schedule": "even"}
    again |= {"schedule_b": "uneven", "cfg_interval": [0.0, 1.0], "cfg_rescale": 0.0}
    assert told == {"prompt": "a pizza, 🍕", **again, "device": "cpu", "model": tiny_folder.name}


def test_windows_of_attention_can_be_set(generate, tiny):
    size = ["--width", "512", "--height", "320"]
    pictures = []
    for tile in (0, 256):
        assert generate("a cat", "-o", "p.png", "--tile", str(tile), *size) == 0
        assert settings_of("p.png")["tile"] == tile
        pictures.append(np.array(Image.open("p.png")))
        expected = tiny.generate("a cat", width=512, height=320, tile=tile, steps_c=2, steps_b=2)[0]
        assert np.array_equal(pictures[-1], (expected * 255).round().byte().numpy())
    assert not np.array_equal(*pictures)


def test_how_to_sample(generate, tiny):
    """Each option reaches `generate`, under its own name."""
    how = "--sampler ddim --schedule uneven --schedule-b even --cfg-interval 0.2 0.8 --cfg-rescale 0.5 --cfg-c 3"
    assert generate("a cat", "-o", "p.png", *how.split()) == 0
    asked = {"sampler": "ddim", "schedule": "uneven", "schedule_b": "even", "cfg_interval": (0.2, 0.8)}
    asked |= {"cfg_rescale": 0.5, "cfg_c": 3.0, "steps_c": 2, "steps_b": 2}

    def drawn(**options):
        return (tiny.generate("a cat", **{**asked, **options})[0] * 255).round().byte().numpy()

    written = np.array(Image.open("p.png"))
    assert np.array_equal(written, drawn())
    for name, other in {"sampler": "ddpm", "cfg_interval": (0, 1), "cfg_rescale": 0.0, "schedule": "even"}.items():
        assert not np.array_equal(written, drawn(**{name: other})), name


@pytest.mark.parametrize("wrong", ["--cfg-interval 0.8 0.2", "--cfg-interval 0 2", "--cfg-rescale 7", "--sampler lms"])
def test_a_wrong_way_to_sample_is_one_line(generate, capsys, wrong):
    assert generate("a cat", *wrong.split()) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and wrong.split()[0].strip("-").replace("-", "_") in message


def test_a_batch_is_numbered(generate, capsys):
    assert generate("a cat", "-o", "cat.png", "--batch", "2") == 0
    assert capsys.readouterr().out == "cat-1.png\ncat-2.png\n"
    first, second = (np.array(Image.open(f"cat-{number}.png")) for number in (1, 2))
    assert not np.array_equal(first, second)


def test_a_picture_to_start_from(generate, tiny, tmp_path):
    picture = np.zeros((90, 120, 4), dtype=np.uint8)
    picture[20:60, 30:80] = (200, 30, 60, 255)  # transparent around it
    Image.fromarray(picture).save("in.png")
    assert generate("a cat", "-o", "out.png", "--image", "in.png", "--denoise", "0.3") == 0
    seen = torch.ones(90, 120, 3)
    seen[20:60, 30:80] = torch.tensor([200, 30, 60]) / 255
    expected = tiny.generate("a cat", image=seen, denoise=0.3, steps_c=2, steps_b=2)[0]
    assert np.array_equal(np.array(Image.open("out.png")), (expected * 255).round().byte().numpy())
    told = settings_of("out.png")
    assert told["denoise"] == 0.3 and told["image"] == "in.png"


@pytest.fixture
def others(tiny_folder):
    """A file of every network with other weights, and what they make together."""
    networks = {
        "stage_a": w.load_stage_a(tiny_folder / SET["stage_a"]),
        "stage_b": w.load_stage_b(tiny_folder / SET["stage_b"]),
        "stage_c": w.load_stage_c(tiny_folder / SET["stage_c"]),
        "semantic_compressor": w.load_semantic_compressor(tiny_folder / SET["semantic_compressor"]),
        "text": w.load_text_encoder(tiny_folder / SET["text_encoder_c"]),
    }
    for name, network in networks.items():
        for parameter in network.parameters():
            parameter.data = parameter * 1.25
        save(network, f"other_{'text_encoder' if name == 'text' else name}.safetensors")
    return networks


@pytest.mark.parametrize(
    "given, roles",
    [
        (["stage_a"], ["stage_a"]),
        (["stage_b"], ["stage_b"]),
        (["stage_c"], ["stage_c"]),
        (["semantic_compressor"], ["semantic_compressor"]),
        (["text_encoder"], ["text_encoder_c", "text_encoder_b"]),  # the set has one for both
        (["stage_c", "stage_a"], ["stage_c", "stage_a"]),
    ],
)
def test_a_network_from_a_file_takes_the_place_of_the_sets(generate, tiny, others, given, roles):
    Image.fromarray(np.full((256, 256, 3), (200, 30, 60), dtype=np.uint8)).save("in.png")
    start = ["--image", "in.png", "--denoise", "0.5"]
    options = [word for name in given for word in (f"--{name.replace('_', '-')}", f"other_{name}.safetensors")]
    assert generate("a cat", "-o", "p.png", *start, *options) == 0
    assert generate("a cat", "-o", "own.png", *start) == 0
    model = dataclasses.replace(tiny, **{role: others[role.split("_encoder_")[0]] for role in roles})
    image = torch.tensor([200, 30, 60]).expand(256, 256, 3) / 255
    expected = model.generate("a cat", image=image, denoise=0.5, steps_c=2, steps_b=2)[0]
    picture = np.array(Image.open("p.png"))
    assert np.array_equal(picture, (expected * 255).round().byte().numpy())
    assert not np.array_equal(picture, np.array(Image.open("own.png")))
    told = settings_of("p.png")
    assert {told[role] for role in SET if role in told} == {f"other_{name}.safetensors" for name in given}


@pytest.mark.parametrize(
    "given, own, role",
    [
        ("--text-encoder-b", False, "text_encoder_b"),
        ("--text-encoder-b", True, "text_encoder_b"),
        ("--text-encoder", True, "text_encoder_c"),
    ],
)
def test_stage_b_may_have_a_text_encoder_of_its_own(tiny, tiny_folder, others, tmp_path, given, own, role):
    shutil.copytree(tiny_folder, tmp_path / "set")
    if own:
        shutil.copy(tmp_path / "set" / SET["text_encoder_c"], tmp_path / "set" / SET["text_encoder_b"])
    arguments = ["-o", "p.png", "--model", "set", given, "other_text_encoder.safetensors", *FEW]
    assert main(["generate", "a cat", *arguments]) == 0
    model = dataclasses.replace(tiny, **{role: others["text"]})
    expected = model.generate("a cat", steps_c=2, steps_b=2)[0]
    assert np.array_equal(np.array(Image.open("p.png")), (expected * 255).round().byte().numpy())


def test_other_commands_take_single_networks_too(tiny_folder, others, capsys):
    assert main(["benchmark", "--runs", "1", "--model", str(tiny_folder), "--stage-c", "none.safetensors"]) == 2
    assert capsys.readouterr().err == "wuerstchen: none.safetensors: there is no such file\n"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--width", "250"], "width is 250"),
        (["--image", "none.png"], "none.png: there is no such file"),
        (["--image", "text.png"], "text.png: not a picture"),
        (["--denoise", "0.5"], "--image"),
        (["-o", "picture.jpg"], ".png"),
        (["-o", "nowhere/picture.png"], "nowhere"),
        (["--sampler", "euler"], "euler"),
        (["--batch", "0"], "batch_size is 0"),
        (["--seed", str(2**64)], "seed is 18446744073709551616"),
        (["--cfg-c", "nan"], "cfg_c is nan"),
        (["--cfg-b", "inf"], "cfg_b is inf"),
        (["--batch", "1000000000000"], "batch_size is 1000000000000"),
        (["--negative", "caf\udce9"], "--negative is not UTF-8"),
        (["--lora", "text.png:inf"], "text.png"),
        (["-o", "x" * 240 + ".png"], "nothing can be written there"),
        (["--tile", "300"], "tile is 300"),
        (["--tile", "64"], "tile is 64"),
        (["--offload"], "offload is set, but the device is the CPU"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "device 'meta'"),
        (["--stage-c", "none.safetensors"], "none.safetensors: there is no such file"),
        (["--stage-c", str(MINI / "stage_b.safetensors")], "stage_b.safetensors: this is a stage_b file"),
        (["--stage-c", str(MINI / "stage_c.safetensors")], "text encoder of width 192, but this text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(generate, tmp_path, capsys, arguments, says):
    (tmp_path / "text.png").write_text("no picture")
    assert generate("a cat", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("wuerstchen: ") and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["text.png"]


def test_a_folder_without_weights_is_named(tmp_path, capsys):
    assert main(["generate", "a cat", "--model", str(tmp_path)]) == 2
    assert "not a whole set of weights" in capsys.readouterr().err
