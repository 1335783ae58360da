"""`wuerstchen evaluate` on a few pictures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.pictures import picture
from wuerstchen_core.cli import main
from wuerstchen_core.reports.evaluation.robustness import OPERATIONS


@pytest.fixture
def sets():
    for name, start in (("ours", 0), ("theirs", 50)):
        Path(name).mkdir()
        for number in range(6):
            Image.fromarray(picture(start + number)).save(f"{name}/{number}.png")
    return "ours", "theirs"


def test_pictures_are_measured_as_table_json_and_plot(sets, capsys):
    assert main(["evaluate", "pictures", "ours", "--real", "theirs", "--output", "figures.json"]) == 0
    told = capsys.readouterr().out
    written = json.loads(Path("figures.json").read_text("utf-8"))
    names = [row["name"] for row in written["figures"]]
    assert names == ["FID", "KID", "precision", "recall"] and written["figures"][0]["value"] > 0
    assert all(f"| {name} |" in told for name in names) and "not comparable with papers" in told
    assert written["pictures"] == written["real_pictures"] == 6
    assert Path("figures.png").read_bytes()[:4] == b"\x89PNG"


def test_robustness_has_a_row_per_operation(sets, capsys):
    assert main(["evaluate", "robustness", "ours", "--limit", "4", "--output", "robust.json"]) == 0
    told, written = capsys.readouterr().out, json.loads(Path("robust.json").read_text("utf-8"))
    assert list(written["FID"]) == list(OPERATIONS) and written["count"] == 4
    assert all(f"| {name} | {value:.4f} |" in told for name, value in written["FID"].items())
    assert Path("robust.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "options, says",
    [
        (["ours"], "nothing to measure"),
        (["ours", "--real", "none"], "none: there is no such folder"),
        (["none", "--real", "ours"], "none: there is no such folder"),
        (["ours", "--inception", "none.pth"], "none.pth"),
        (["ours", "--clip", "none.pt"], "none.pt: there is no such file"),
        (["ours", "--pickscore", "none"], "none: there is no such folder"),
        (["ours", "--real", "theirs", "--output", "figures.txt"], "takes a .json file"),
        (["ours", "--real", "theirs", "--output", "none/figures.json"], "none: there is no such folder"),
        (["ours", "--real", "theirs", "--batch", "0"], "--batch is 0"),
        (["ours", "--real", "theirs", "--prompts", "none.txt"], "none.txt"),
        (["a.tar", "--real", "theirs", "--prompts", "none.txt"], "--prompts is for folders"),
    ],
)
def test_what_cannot_be_measured_is_one_line(sets, options, says, capsys):
    assert main(["evaluate", "pictures", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wuerstchen: ") and says in line and len(line) < 500
