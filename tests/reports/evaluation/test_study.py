"""The page holds what was asked for and nothing that tells the sets apart; votes are tallied by counting."""

import json
import re

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.pictures import picture
from wuerstchen_core import WuerstchenError
from wuerstchen_core.reports.evaluation.study import read_votes, table, tallied, write_page

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> & $x$'


@pytest.fixture
def sets(tmp_path):
    for name, start in (("ours", 0), ("theirs", 10)):
        (tmp_path / name).mkdir()
        for number in range(3):
            told = PngImagePlugin.PngInfo()
            told.add_text("prompt", name)
            Image.fromarray(picture(start + number)).save(tmp_path / name / f"{number}.png", pnginfo=told)
    return {"A": str(tmp_path / "ours"), "B": str(tmp_path / "theirs")}


def test_the_page_shows_the_pairs_under_names_that_tell_nothing(sets, tmp_path):
    page = tmp_path / "page"
    write_page(page, sets, ["0", "2"], ["a cat", EVIL])
    html = (page / "index.html").read_text("utf-8")
    assert len(re.findall("<script", html)) == 2 and EVIL not in html and "</script><script>" not in html
    study = json.loads(re.search(r'<script id="pairs" type="application/json">(.*?)</script>', html, re.DOTALL)[1])
    assert [(pair["key"], pair["prompt"]) for pair in study["pairs"]] == [("0", "a cat"), ("2", EVIL)]
    for pair in study["pairs"]:
        for name, start in (("A", 0), ("B", 10)):
            assert re.fullmatch(r"[0-9a-f]{16}\.png", pair[name])
            with Image.open(page / "pictures" / pair[name]) as image:
                assert (np.asarray(image) == picture(start + int(pair["key"]))).all() and not image.info
    assert len(list((page / "pictures").iterdir())) == 4
    with pytest.raises(WuerstchenError, match="--page takes a folder that is empty"):
        write_page(page, sets, ["0"], ["a cat"])


def test_the_page_needs_nothing_from_elsewhere(sets, tmp_path):
    write_page(tmp_path / "page", sets, ["0"], ["a cat"])
    html = (tmp_path / "page" / "index.html").read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]+\.|\bfetch\(|innerHTML|<link", html)


def saved(path, participant, choices, **changed):
    votes = [{"key": str(key), "choice": choice, "left": "A"} for key, choice in enumerate(choices)]
    content = {"study": "s", "A": "ours", "B": "theirs", "participant": participant, "votes": votes}
    path.write_text(json.dumps(content | changed))
    return path


def test_votes_are_counted(tmp_path):
    people = {
        "p": ["A", "A", "B", "equal"],
        "q": ["A", "B", "B", "A"],
        "r": ["A", "equal", "equal", "equal"],
    }
    rows = tallied([read_votes(saved(tmp_path / name, name, choices)) for name, choices in people.items()])
    assert [(row.name, row.counts) for row in rows] == [
        ("p", (2, 1, 1)),
        ("q", (2, 0, 2)),
        ("r", (1, 3, 0)),
        ("all votes", (5, 4, 3)),
        ("majority per prompt", (2, 1, 1)),
    ]
    assert [row.rate.rate for row in rows] == pytest.approx([2.5 / 4, 0.5, 2.5 / 4, 7 / 12, 2.5 / 4])
    lines = list(table(rows))
    assert len(lines) == 7 and lines[5].startswith("| all votes | 5 (42%) | 4 (33%) | 3 (25%) | 58.3% |")


def test_votes_that_do_not_go_together_are_refused(tmp_path):
    one, other = (read_votes(saved(tmp_path / name, name, ["A"], study=name)) for name in "pq")
    with pytest.raises(WuerstchenError, match="several studies"):
        tallied([one, other])
    with pytest.raises(WuerstchenError, match="participant p is there twice"):
        tallied([one, one])


@pytest.mark.parametrize(
    "changed",
    [
        {"votes": []},
        {"votes": [{"key": "0", "choice": "C"}]},
        {"votes": [{"key": "0", "choice": "A"}, {"key": "0", "choice": "B"}]},
        {"votes": [{"key": 0, "choice": "A"}]},
        {"votes": [{"key": ["0"], "choice": "A"}]},
        {"votes": [{"choice": "A"}]},
        {"votes": 3},
        {"study": None},
    ],
)
def test_other_files_are_no_votes(tmp_path, changed):
    with pytest.raises(WuerstchenError, match="votes.json: no votes that the page") as caught:
        read_votes(saved(tmp_path / "votes.json", "p", ["A"], **changed))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    (tmp_path / "votes.json").write_text("[" * 100_000)
    with pytest.raises(WuerstchenError, match="no votes that the page"):
        read_votes(tmp_path / "votes.json")
    with pytest.raises(WuerstchenError, match="there is no such file"):
        read_votes(tmp_path / "none.json")
