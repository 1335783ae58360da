"""`wuerstchen evaluate stages` and `evaluate sweep` with a tiny set of weights."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.pictures import picture
from wuerstchen_core.cli import main

SMALL = ["--width", "64", "--height", "64"]


@pytest.fixture
def prompts():
    Path("prompts.txt").write_text("a cat\na dog\na house\na fox\n")
    Path("real").mkdir()
    for number in range(5):
        Image.fromarray(picture(number)).save(f"real/{number}.png")
    return ["--prompts", "prompts.txt", *SMALL]


def test_stages_are_compared(prompts, tiny_folder, capsys):
    command = ["stages", "--model", str(tiny_folder), *prompts, "--steps-c", "1", "--real", "real"]
    assert main(["evaluate", *command, "--output", "s.json"]) == 0
    told, written = capsys.readouterr().out, json.loads(Path("s.json").read_text("utf-8"))
    assert [row["name"] for row in written["rows"]] == [
        "B + A without text and with it",
        "B + A from other noise and from the same",
    ]
    assert all(f"| {row['name']} | {row['psnr']:.2f} |" in told for row in written["rows"])
    assert written["prompts"] == 4 and list(written["FID_to_real"]) == ["B + A with text", "B + A without text"]
    assert Path("s.png").read_bytes()[:4] == b"\x89PNG"


def test_captions_of_a_folder_are_prompts(prompts, tiny_folder):
    for number in range(5):
        Path(f"real/{number}.txt").write_text(f"number {number}")
    command = ["stages", "--model", str(tiny_folder), *SMALL, "--steps-c", "1", "--prompts", "real", "--limit", "3"]
    assert main(["evaluate", *command, "--output", "s.json"]) == 0
    assert json.loads(Path("s.json").read_text("utf-8"))["prompts"] == 3


def test_a_sweep_goes_on_where_it_was_stopped(prompts, tiny_folder, capsys):
    command = ["evaluate", "sweep", "--model", str(tiny_folder), *prompts, "--real", "real", "--output", "c.json"]
    assert main([*command, "--cfg", "1", "2", "--steps-c", "2"]) == 0
    first = json.loads(Path("c.json").read_text("utf-8"))["rows"]
    assert [row["cfg"] for row in first] == [1, 2] and all(row["FID"] > 0 and row["seconds"] > 0 for row in first)
    assert len(Path("c.csv").read_text("utf-8").splitlines()) == 3 and Path("c.png").stat().st_size > 1000
    assert main([*command, "--cfg", "2", "3", "--steps-c", "2"]) == 0
    rows = json.loads(Path("c.json").read_text("utf-8"))["rows"]
    assert rows[:2] == first and [row["cfg"] for row in rows] == [1, 2, 3]
    capsys.readouterr()
    Path("prompts.txt").write_text("a cat\na dog\na house\na bear\n")
    assert (
        main([*command, "--cfg", "2"]) == 2
        and "c.json: an earlier sweep, with another sha256" in capsys.readouterr().err
    )
    Path("prompts.txt").write_text("a cat\na dog\na house\na fox\n")
    again = Path("again")
    shutil.copytree(tiny_folder, again)
    (again / "stage_a.safetensors").write_bytes((tiny_folder / "stage_a.safetensors").read_bytes()[:-4] + b"\x00" * 4)
    assert (
        main([*command, "--model", "again", "--cfg", "2"]) == 2 and "another model, sha256" in capsys.readouterr().err
    )


def test_pictures_are_written_and_drawn_where_they_are_missing(prompts, tiny_folder):
    command = ["evaluate", "sweep", "--model", str(tiny_folder), *prompts, "--real", "real", "--output", "c.json"]
    assert main([*command, "--steps-c", "1", "--cfg", "1"]) == 0
    assert main([*command, "--steps-c", "1", "--cfg", "1", "--pictures", "p"]) == 0
    (folder,) = Path("p").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:06}.png" for i in range(4)]
    assert len(json.loads(Path("c.json").read_text("utf-8"))["rows"]) == 1


@pytest.mark.parametrize(
    "options, says",
    [
        (["stages"], "give --prompts FILE"),
        (["stages", "--prompts", "none.txt"], "none.txt"),
        (["stages", "--prompts", "real"], "0.png: has no caption"),
        (["stages", "--prompts", "prompts.txt", "--width", "72"], "--width is 72"),
        (["stages", "--prompts", "prompts.txt", "--batch", "1"], "--batch is 1"),
        (["stages", "--prompts", "prompts.txt", "--distilled"], "no distilled networks"),
        (["stages", "--prompts", "prompts.txt", "--model", "none"], "none: not a whole set"),
        (["sweep", "--prompts", "prompts.txt"], "nothing to measure"),
        (["sweep", "--prompts", "prompts.txt", "--real", "real", "--limit", "3"], "3 prompts: these figures need"),
        (["sweep", "--prompts", "prompts.txt", "--real", "none"], "none: there is no such folder"),
        (["sweep", "--prompts", "prompts.txt", "--clip", "none.pt"], "none.pt: there is no such file"),
        (["sweep", "--prompts", "prompts.txt", "--real", "real", "--clip-model", "x"], "add --clip FILE"),
        (["sweep", "--prompts", "prompts.txt", "--inception", "i", "--features", "f"], "not allowed with argument"),
        (["sweep", "--prompts", "prompts.txt", "--real", "real", "--sampler", "magic"], "unknown sampler 'magic'"),
        (["sweep", "--prompts", "prompts.txt", "--real", "real", "--steps-c", "4", "0"], "steps_c is 0"),
        (["sweep", "--prompts", "prompts.txt", "--real", "real", "--pictures", "prompts.txt"], "prompts.txt"),
        (["sweep", "--emoji", "none", "--real", "real"], "none"),
        (["sweep", "--prompts", "prompts.txt", "--real", "real", "--output", "c.txt"], "takes a .json file"),
        (["sweep", "--prompts", "prompts.txt", "--real", "real", "--output", "none/c.json"], "no such folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(prompts, tiny_folder, options, says, capsys):
    command = ["evaluate", *options]
    command += [] if "--output" in options else ["--output", "out.json"]
    command += [] if "--model" in options else ["--model", str(tiny_folder)]
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and "wuerstchen: " in line and says in line and len(line) < 500
    assert not Path("out.json").exists()
