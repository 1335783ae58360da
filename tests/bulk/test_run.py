"""wuerstchen generate --prompts: the same bytes however the work is shared, killed and gone on with."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wuerstchen_core.cli import main
from wuerstchen_core.training.data.shards import Shards, expand

FEW = ["--steps-c", "2", "--steps-b", "2"]
ROWS = [
    {"prompt": f"picture {i}", **({"width": 320} if i % 4 == 1 else {}), **({"seed": 99} if i == 5 else {})}
    for i in range(11)
]
ROWS[3] = {"prompt": "too wide", "width": 300}
ROWS[7] = {"prompt": "(loud:9999)"}
DRAWN = [i for i in range(11) if i not in (3, 7)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text("\n".join(map(json.dumps, ROWS)))


@pytest.fixture
def arguments(tiny_folder):
    return ["generate", "--model", str(tiny_folder), "--batch", "3"]


@pytest.fixture
def draw(arguments):
    return lambda out, *more, prompts="p.jsonl": main(
        [*arguments, *(FEW if prompts else []), *more, "--out", out, *(["--prompts", prompts] if prompts else [])]
    )


def files(folder):
    """Name -> bytes of all in a folder, hidden ones too, but for the record of errors."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.name.startswith("errors")}


@pytest.fixture
def whole(draw):
    """What one process draws in one go."""
    assert draw("whole") == 2
    return files("whole")


def test_each_picture_is_that_of_generate(tiny, tiny_folder, whole):
    """Drawn alone, a picture differs by no more than rounding: one level of a few values of a colour."""
    assert sorted(whole) == [f"{i:06}.png" for i in DRAWN]
    for i in DRAWN:
        width, seed = ROWS[i].get("width", 256), ROWS[i].get("seed", i)
        alone = tiny.generate(ROWS[i]["prompt"], width=width, seed=seed, steps_c=2, steps_b=2)[0]
        picture = np.array(Image.open(f"whole/{i:06}.png"))
        differences = np.abs((alone * 255).round().numpy() - picture)
        assert differences.max() <= 1 and (differences > 0).mean() < 0.01, i
    with Image.open("whole/000005.png") as picture:
        told = json.loads(picture.text["wuerstchen"])
    assert (told["prompt"], told["seed"], told["batch_size"]) == ("picture 5", 99, 1)
    again = ["--from", "whole/000005.png", "-o", "again.png", "--model", str(tiny_folder)]
    assert main(["generate", *again]) == 0
    pictures = (np.array(Image.open(path)).astype(int) for path in ("again.png", "whole/000005.png"))
    assert np.abs(np.subtract(*pictures)).max() <= 1


def test_bad_lines_are_told_and_stop_nothing(whole, draw, capsys):
    errors = [json.loads(line) for line in Path("whole/errors.jsonl").read_text().splitlines()]
    assert [(error["line"], error["index"]) for error in errors] == [(4, 3), (8, 7)]
    assert "width is 300" in errors[0]["error"] and "weight" in errors[1]["error"]
    capsys.readouterr()
    assert draw("whole") == 2  # nothing is drawn again, and they are told again
    assert "2 lines could not be drawn: whole/errors.jsonl" in capsys.readouterr().err
    assert len(Path("whole/errors.jsonl").read_text().splitlines()) == 2


def test_three_machines_draw_the_same_bytes(whole, draw):
    statuses = [draw(f"part{i}", "--shard", f"{i}/3") for i in (1, 2, 3)]
    parts = [files(f"part{i}") for i in (1, 2, 3)]
    assert sum(map(len, parts)) == len(whole) and all(parts)  # none twice
    assert {name: content for part in parts for name, content in part.items()} == whole
    assert statuses.count(2) == 1  # one of them tells the bad lines


def test_processes_of_a_launcher_share_a_folder(whole, draw, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        draw("shared")
    assert files("shared") == whole
    assert Path("shared/errors-1-of-2.jsonl").exists() and not Path("shared/errors-2-of-2.jsonl").exists()


def test_what_is_missing_is_drawn_with_the_same_bytes(whole, draw):
    times = {}
    for path in Path("whole").glob("*.png"):
        times[path.name] = path.stat().st_mtime_ns
    for name in ("000000.png", "000005.png"):
        Path("whole", name).unlink()
    Path("whole/.000005.png.abcdefgh.partial").mkdir()
    draw("whole")
    assert files("whole") == whole
    again = {path.name for path in Path("whole").glob("*.png") if path.stat().st_mtime_ns != times[path.name]}
    assert again == {"000000.png", "000005.png"}


def test_killed_anywhere_the_same_command_goes_on(draw, arguments):
    """SIGKILL once some files are there, then the same again: every picture there, none cut, the same bytes."""
    out, more = "killed/{000..}.tar", ["--per-shard", "4"]
    draw(out.replace("killed", "whole"), *more)
    command = [sys.executable, "-m", "wuerstchen_core", *arguments, *FEW, "--prompts", "p.jsonl", "--out", out, *more]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    moment = random.randint(1, 4)

    def drawn() -> int:
        return sum(name.endswith(".png") for *_, names in os.walk("killed") for name in names)

    while process.poll() is None and drawn() < moment:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert draw(out, *more) == 2
    assert files("killed") == files("whole")


def test_shards_are_read_by_the_trainer(draw):
    assert draw("shards/{007..}.tar", "--per-shard", "4") == 2
    assert sorted(files("shards")) == ["007.tar", "008.tar", "009.tar"]
    reader = Shards(expand("shards/{007..009}.tar"), [(64, 64)], batch=1, seed=0)
    found = {}
    for batch in islice(reader.batches(0, 1), len(DRAWN)):
        found[batch.samples[0].caption] = (batch.samples[0].size, batch.skipped)
    assert found == {ROWS[i]["prompt"]: ((256, ROWS[i].get("width", 256)), []) for i in DRAWN}


def test_texts_that_are_not_kept_are_read_again(whole, draw, monkeypatch):
    monkeypatch.setattr("wuerstchen_core.bulk.draw.TEXTS", 0)
    draw("again")
    assert files("again") == whole


@pytest.mark.parametrize(
    "wrong, why",
    [
        (["a cat"], "leave the one on the command line out"),
        (["-o", "x.png"], "-o is for a single picture"),
        (["--shard", "4/3"], "--shard is '4/3'"),
        (["--pick", "p.jsonl"], "--pick chooses among the latents"),
        (["--per-shard", "3"], "--per-shard is about shards"),
        (["--lora", "missing.safetensors"], "missing.safetensors"),
        (["--width", "100"], "width is 100"),
        (["--sampler", "lms"], "unknown sampler"),
    ],
)
def test_a_wrong_option_is_one_line(draw, capsys, wrong, why):
    assert draw("out", *wrong) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and why in message, message
    assert not Path("out").exists()


def test_latents_first_then_the_pictures_of_them(whole, draw):
    assert draw("latents", "--until", "stage-c") == 2
    names = sorted(name for i in DRAWN for name in (f"{i:06}.preview.png", f"{i:06}.safetensors"))
    assert sorted(files("latents")) == [name for name in names if name.endswith(".safetensors")]  # no previewer here
    assert draw("finished", "--from", "latents", prompts=None) == 0
    assert files("finished") == whole


def test_only_those_that_are_picked(whole, draw):
    draw("latents", "--until", "stage-c")
    Path("pick.txt").write_text("000009.preview.png\n000001\n")
    assert draw("finished", "--from", "latents", "--pick", "pick.txt", prompts=None) == 0
    assert sorted(files("finished")) == ["000001.png", "000009.png"]
    for name in files("finished"):
        pictures = (np.array(Image.open(f"{folder}/{name}")).astype(int) for folder in ("finished", "whole"))
        assert np.abs(np.subtract(*pictures)).max() <= 1
    Path("pick.txt").write_text("000003")
    assert draw("finished", "--from", "latents", "--pick", "pick.txt", prompts=None) == 2
