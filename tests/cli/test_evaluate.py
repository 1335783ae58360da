"""`wuerstchen evaluate` on a few pictures."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.pictures import picture
from wuerstchen_core.cli import main
from wuerstchen_core.reports.evaluation import text_scores
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
    assert main(["evaluate", "robustness", "ours", "--limit", "2", "--output", "robust.json"]) == 0
    told, written = capsys.readouterr().out, json.loads(Path("robust.json").read_text("utf-8"))
    assert list(written["FID"]) == list(OPERATIONS) and written["count"] == 2
    assert all(f"| {name} | {value:.4g} |" in told for name, value in written["FID"].items())
    assert Path("robust.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def brightness(monkeypatch):
    """In PickScore's place: the brighter picture wins, if its caption is there."""

    def score(images, captions):
        assert all(captions)
        return torch.stack([image.mean() for image in images])

    monkeypatch.setattr(text_scores, "pick_score", lambda folder, device: score)


def grey(path, value):
    Path(path).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path)


@pytest.fixture
def greys():
    for number, (ours, theirs) in enumerate([(9, 5), (9, 9), (200, 100), (3, 4), (8, 2)]):
        grey(f"a/{number}.png", ours)
        grey(f"b/{number}.png", theirs)
    Path("prompts.txt").write_text("\n".join(f"grey {number}" for number in range(5)))


def test_preference_is_counted_and_a_page_written(greys, brightness, capsys):
    options = ["--prompts", "prompts.txt", "--pickscore", "ps", "--page", "page", "--output", "preference.json"]
    assert main(["evaluate", "preference", "a", "b", *options]) == 0
    told, written = capsys.readouterr().out, json.loads(Path("preference.json").read_text("utf-8"))
    assert "prefers A on 70.0% of 5 prompts" in told and "3 for A, 1 equal, 1 for B" in told
    assert [written[name] for name in ("A_wins", "equal", "B_wins")] == [3, 1, 1]
    assert written["win_rate"]["rate"] == 0.7 and written["mean_A"] == pytest.approx(229 / 5 / 255)
    assert "grey 4" in Path("page/index.html").read_text("utf-8") and len(list(Path("page/pictures").iterdir())) == 10


def test_votes_become_a_table(capsys):
    votes = [{"key": str(key), "choice": choice} for key, choice in enumerate(["A", "A", "equal", "B"])]
    content = {"study": "s", "A": "ours", "B": "theirs", "participant": "p", "votes": votes}
    Path("votes.json").write_text(json.dumps(content))
    assert main(["evaluate", "votes", "votes.json", "--output", "table.json"]) == 0
    assert "| all votes | 2 (50%) | 1 (25%) | 1 (25%) | 62.5% |" in capsys.readouterr().out
    rows = json.loads(Path("table.json").read_text("utf-8"))["rows"]
    assert [row["votes"] for row in rows] == ["p", "all votes", "majority per prompt"]
    assert [rows[0][name] for name in ("A", "equal", "B")] == [2, 1, 1]


@pytest.mark.parametrize(
    "command, says",
    [
        (["preference", "a", "b"], "--pickscore FOLDER is missing"),
        (["preference", "a", "none", "--page", "page"], "none: there is no such folder"),
        (["preference", "a", "b", "--page", "a", "--prompts", "prompts.txt"], "a: --page takes a folder that is empty"),
        (["preference", "a", "b", "--page", "page"], "5 of 5 pictures have no caption"),
        (["votes", "none.json"], "none.json: there is no such file"),
        (["votes", "prompts.txt"], "prompts.txt: no votes"),
        (["robustness", "none"], "none: there is no such folder"),
    ],
)
def test_what_cannot_be_compared_is_one_line(greys, command, says, capsys):
    assert main(["evaluate", *command]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "wuerstchen: " in line and says in line and not Path("page").exists()


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
