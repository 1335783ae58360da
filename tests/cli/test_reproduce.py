"""`wuerstchen generate --from PICTURE`: the same picture again, and the command line that draws it."""

import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wuerstchen_core import save
from wuerstchen_core.cli import main
from wuerstchen_core.cli.reproduce import read_lora, shown_strength

FEW = ["--steps-c", "2", "--steps-b", "2"]


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def own(tiny_folder, tmp_path):
    """The tiny set in the current folder, as `own`."""
    shutil.copytree(tiny_folder, tmp_path / "own")


@pytest.mark.parametrize(
    "arguments",
    [
        ["a cat", "--seed", "-3", "--seed-b", "8", "--negative", "-- a 'dog'", "--width", "264", "--cfg-c", "3.25"],
        ["-- a cat", "--sampler", "ddim", "--schedule", "uneven", "--cfg-b", "1.5"],
        ["a cat", "--image", "in.png", "--denoise", "0.25"],
        ["a cat", "--stage-c", "c.safetensors", "--lora", "style.safetensors:-0.3", "--lora", "style.safetensors:0.1"],
    ],
    ids=" ".join,
)
def test_a_picture_is_drawn_again_and_the_printed_command_draws_it_too(own, tiny, style, tmp_path, capsys, arguments):
    Image.fromarray(np.full((90, 120, 3), (200, 30, 60), dtype=np.uint8)).save("in.png")
    save(tiny.stage_c, "c.safetensors")
    prompt, *options = arguments
    assert main(["generate", "-o", "first.png", "--model", "own", *FEW, *options, "--", prompt]) == 0
    capsys.readouterr()
    assert main(["generate", "--from", "first.png", "-o", "again.png"]) == 0
    command, path = capsys.readouterr().out.splitlines()
    assert path == "again.png" and np.array_equal(pixels("first.png"), pixels("again.png"))
    (tmp_path / "again.png").unlink()
    program, *words = shlex.split(command)
    assert program == "wuerstchen" and "--from" not in words and main(words) == 0
    assert np.array_equal(pixels("first.png"), pixels("again.png"))


def test_what_is_given_takes_the_place_of_what_the_picture_says(own, tiny, capsys):
    assert main(["generate", "a cat", "-o", "first.png", "--model", "own", *FEW, "--seed", "3"]) == 0
    assert main(["generate", "--from", "first.png", "-o", "other.png", "--seed", "4", "a dog"]) == 0
    expected = tiny.generate("a dog", seed=4, steps_c=2, steps_b=2)[0]
    assert np.array_equal(pixels("other.png"), (expected * 255).round().byte().numpy())


def test_a_batch_is_drawn_again_as_a_whole(own, capsys):
    assert main(["generate", "a cat", "-o", "b.png", "--model", "own", *FEW, "--batch", "3"]) == 0
    assert main(["generate", "--from", "b-2.png", "-o", "again.png"]) == 0
    for number in (1, 2, 3):
        assert np.array_equal(pixels(f"b-{number}.png"), pixels(f"again-{number}.png"))


def test_files_are_looked_for_here_and_beside_the_picture_only(own, tmp_path, capsys):
    assert main(["generate", "a cat", "-o", "p.png", "--model", "own", *FEW]) == 0
    (tmp_path / "there").mkdir()
    shutil.move("p.png", "there/p.png")
    shutil.move("own", "there/own")
    assert main(["generate", "--from", "there/p.png", "-o", "again.png"]) == 0
    shutil.move("there/own", "elsewhere")
    capsys.readouterr()
    assert main(["generate", "--from", "there/p.png", "-o", "again.png"]) == 2
    said = "wuerstchen: there/p.png: it was drawn with 'own', which is neither here nor beside it: give --model\n"
    assert capsys.readouterr().err == said
    assert main(["generate", "--from", "there/p.png", "-o", "again.png", "--model", "elsewhere"]) == 0


def carrying(path, **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


@pytest.mark.parametrize(
    "record, says",
    [
        ({"prompt": "", "width": 250}, "width is 250"),
        ({"prompt": "", "steps_c": 10**9}, "steps_c is 1000000000"),
        ({"prompt": "", "batch_size": 10**9}, "batch_size is 1000000000"),
        ({"prompt": "", "cfg_c": float("nan")}, "cfg_c is nan"),
        ({"prompt": "", "sampler": "\x1b[2J"}, "unknown sampler"),
        ({"prompt": "\udce9"}, "the prompt is not UTF-8"),
        ({"prompt": "", "denoise": 0.5}, "--image"),
        ({"prompt": "", "stage_c": ".."}, "give --stage-c"),
        ({"prompt": "", "model": "/"}, "give --model"),
        ({"prompt": "", "loras": [""]}, "give --lora"),
    ],
)
def test_a_record_is_checked_as_options_are(capsys, record, says):
    carrying("p.png", wuerstchen=json.dumps(record))
    assert main(["generate", "--from", "p.png", "-o", "again.png"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("wuerstchen: ") and says in error and len(error) < 500 and "\x1b" not in error


def test_what_cannot_be_the_same_is_told(own, capsys):
    carrying("p.png", wuerstchen=json.dumps({"prompt": "a cat", "model": "own", "steps_c": 1, "steps_b": 1, "tea": 1}))
    assert main(["generate", "--from", "p.png", "-o", "again.png"]) == 0
    assert "wuerstchen: p.png: it was drawn with 'tea', which this version does not know" in capsys.readouterr().err


def test_the_picture_that_is_read_is_not_overwritten(capsys):
    carrying("wuerstchen.png", wuerstchen='{"prompt": ""}')
    assert main(["generate", "--from", "wuerstchen.png"]) == 2
    assert "give another -o" in capsys.readouterr().err
    assert main(["generate"]) == 2
    assert "give a prompt, or a picture with --from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "strength, text", [(1.0, "1"), (-0.5, "-0.5"), (0.1234567891, "0.1234567891"), (1e-9, "1e-09")]
)
def test_a_strength_is_written_whole(strength, text):
    assert shown_strength(strength) == text
    assert read_lora(f"C:a.safetensors:{text}")[1] == strength
