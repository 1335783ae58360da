"""Every combination once, with the figures of its own pictures; what a file has is not drawn again."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen_core import Geometry, WuerstchenError
from wuerstchen_core.reports.evaluation import curves

PROMPTS = ["a cat", "a dog " * 60, "a house"]  # the second one has two chunks and a batch of its own


def brightness(images, captions):
    assert all(captions)
    return torch.stack([image.mean() for image in images])


def test_combinations_are_all_of_them_and_each_once(tiny):
    given = {"cfg_c": [1.0, 3.0, 3], "steps_c": [2, 4], "sampler": ["ddpm"], "schedule": None}
    found = [curves.settings(one) for one in curves.combinations(tiny, None, given)]
    assert [(row["cfg"], row["steps_c"]) for row in found] == [(1, 2), (1, 4), (3, 2), (3, 4)]
    assert {(row["sampler"], row["sampler_b"], row["distilled"]) for row in found} == {("ddpm", "ddpm", False)}
    assert len({curves.name_of(row) for row in found}) == 4
    with pytest.raises(WuerstchenError, match="steps_c"):
        curves.combinations(tiny, None, {"steps_c": [0]})


def test_a_row_has_the_figures_of_the_pictures_that_generate_draws(tiny, tmp_path):
    options = {"steps_c": 2, "steps_b": 1, "cfg_c": 3.0}
    row = curves.measure(
        tiny,
        PROMPTS,
        tiny.sampling(**options),
        Geometry(64, 64),
        {"clip": brightness},
        None,
        None,
        2,
        5,
        tmp_path / "out",
    )
    expected = [
        tiny.generate(prompt, seed=5 + i, width=64, height=64, **options)[0].double().numpy()
        for i, prompt in enumerate(PROMPTS)
    ]
    means = [one.mean() for one in expected]
    assert row["CLIP score"] == pytest.approx(np.mean(means), abs=1e-5)
    assert row["CLIP score ±"] == pytest.approx(np.std(means, ddof=1), abs=1e-5) and row["seconds"] > 0
    assert curves.settings(tiny.sampling(**options)).items() <= row.items()
    for i, one in enumerate(expected):
        with Image.open(tmp_path / "out" / f"{i:06}.png") as image:
            assert np.abs(np.asarray(image) / 255 - one).max() < 0.51 / 255 + 1e-4
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.fixture
def swept(tiny, tmp_path):
    """(steps of Stage C, …) -> the rows in the end and what was measured for them."""

    def run(*steps, about=None, again=lambda row: False, stop=None):
        asked, rows = [], []

        def measured(sampling):
            if sampling.stage_c.steps == stop:
                raise KeyboardInterrupt
            asked.append(sampling.stage_c.steps)
            return {**curves.settings(sampling), "seconds": 1.0, "FID": float(len(asked))}

        samplings = curves.combinations(tiny, None, {"steps_c": list(steps)})
        for rows in curves.sweep(samplings, about or {"seed": 0}, tmp_path / "c.json", measured, again):
            assert json.loads((tmp_path / "c.json").read_text("utf-8"))["rows"] == rows
        return [row["steps_c"] for row in rows], asked

    return run


def test_an_interrupted_sweep_goes_on(swept):
    with pytest.raises(KeyboardInterrupt):
        swept(2, 4, 6, stop=6)
    assert swept(2, 4, 6) == ([2, 4, 6], [6])
    assert swept(4, 8) == ([2, 4, 6, 8], [8])
    assert swept(2) == ([2, 4, 6, 8], [])
    assert swept(2, 4, again=lambda row: row["steps_c"] > 2) == ([2, 6, 8, 4], [4])


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "another seed"),
        ("[]", "no file that `evaluate sweep` wrote"),
        ("{", "no file that"),
        ('{"seed": 1, "rows": [{}]}', "no file that"),
        ('{"seed": 1, "rows": [], "prompts": 4}', "another prompts"),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(swept, tmp_path, content, says):
    swept(2)
    if content is not None:
        (tmp_path / "c.json").write_text(content)
    before = (tmp_path / "c.json").read_text()
    with pytest.raises(WuerstchenError, match=f"c.json: .*{says}"):
        swept(2, about={"seed": 1})
    assert (tmp_path / "c.json").read_text() == before


ROWS = [
    {**dict.fromkeys(curves.SETTINGS, "x"), "cfg": cfg, "steps_c": steps, "steps_b": 5, "seconds": 1.0, **figures}
    for cfg, steps, figures in (
        (1.0, 4, {"FID": 9.0, "FID ±": 1.0, "CLIP score": 20.0}),
        (4.0, 4, {"FID": 7.0, "CLIP score": 24.0}),
        (2.0, 4, {"FID": 8.0, "CLIP score": 22.0}),
        (1.0, 8, {"FID": 6.0, "CLIP score": 21.0}),
    )
]


def test_the_plot_has_fid_over_the_clip_score_and_all_figures_over_guidance(tmp_path, monkeypatch):
    seen = []

    class Panel:
        def plot(self, x, y, **rest):
            seen.append((rest["label"], x, y))

        def __getattr__(self, name):
            return lambda *a, **k: None

    class Plotted:
        def __init__(self, path, panels, **rest):
            self.panels = [Panel() for _ in range(panels)]

        def __enter__(self):
            return self.panels

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(curves, "plotted", Plotted)
    curves.plot(tmp_path / "p.png", ROWS, "t")
    four, eight = "steps_c 4", "steps_c 8"
    assert seen[:2] == [(four, [20.0, 22.0, 24.0], [9.0, 8.0, 7.0]), (eight, [21.0], [6.0])]
    assert seen[2:4] == [(four, [1.0, 2.0, 4.0], [9.0, 8.0, 7.0]), (eight, [1.0], [6.0])]
    assert len(seen) == 8 and seen[-2] == (four, [1.0, 2.0, 4.0], [1.0, 1.0, 1.0])


def test_the_table_and_the_csv_have_every_row(tmp_path):
    curves.write_csv(tmp_path / "c.csv", ROWS)
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["cfg"], row["FID"], row["FID ±"]) for row in rows][:2] == [("1.0", "9.0", "1.0"), ("4.0", "7.0", "")]
    lines = list(curves.table(ROWS))
    assert len(lines) == 6 and "FID ±" not in lines[0] and "| 24 |" in lines[3]
    curves.plot(Path(tmp_path / "p.png"), ROWS, "$title_of")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
