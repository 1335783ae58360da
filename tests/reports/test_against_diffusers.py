"""Würstchen beside diffusers: both sides draw the same, and the figures are what was timed."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.reference import distance, steps_of_diffusers
from wuerstchen_core import pipeline
from wuerstchen_core.cli import main
from wuerstchen_core.diffusion import samplers
from wuerstchen_core.diffusion.options import STAGE_B, STAGE_C
from wuerstchen_core.geometry import Geometry
from wuerstchen_core.models.stage_a import VQGAN, StageAConfig
from wuerstchen_core.reports import comparison, timing
from wuerstchen_core.reports.against_diffusers import DEFAULTS, DIFFUSERS, OURS, Task, stages
from wuerstchen_core.reports.comparison import compare, table
from wuerstchen_core.reports.cost import outline, wuerstchen_costs
from wuerstchen_core.reports.timing import Timing, time_in_turn

NAMES = ["text encoders", "Stage C", "Stage B", "Stage A"]
SMALL = Task(Geometry(128, 256), (1, 2))


@pytest.fixture(scope="module")
def networks(tiny_folder):
    return outline(tiny_folder)


@pytest.fixture(scope="module")
def built(networks):
    return list(stages(networks, SMALL))


def test_both_sides_compute_the_same(built, monkeypatch):
    """With the same noise and end (alpha_bar of 0 is 0.9999); diffusers gives Stage C's latent as features of the
    released compressor."""

    def drawn(latent, seed, batch_index):
        torch.manual_seed(seed)
        return lambda: torch.randn(latent.shape)

    monkeypatch.setattr(pipeline, "noise_source", drawn)
    monkeypatch.setattr(samplers, "_steps", steps_of_diffusers)
    for stage in built:
        torch.manual_seed(0)
        theirs, ours = (stage.runs[side](3, lambda: None) for side in (DIFFUSERS, OURS))
        if stage.name == "text encoders":  # one for both stages: diffusers reads the prompt for each
            assert torch.equal(theirs[2], theirs[0])
            theirs, ours = torch.cat(theirs[:2]), torch.cat(ours)
        elif stage.name == "Stage C":
            theirs = (theirs + 1) / 42
        assert len(theirs) == len(ours) == (stage.batch if stage.name != "text encoders" else 2)
        assert ours.std() > 0.01 and distance(ours, theirs) < 1e-4, stage.name


def test_every_step_is_told_of(built):
    for stage in built[2:6]:
        for run in stage.runs.values():
            done = []
            run(2, lambda done=done: done.append(1))
            assert len(done) == 2


def test_operations_are_those_of_the_costs(networks, built):
    """Of a step, and of a batch twice as large twice as many: all but those of the time embeddings."""
    costs = {n: [cost.picture for cost in wuerstchen_costs(networks, SMALL.geometry, n, n)] for n in (3, 4)}
    one, two = ([stage.operations for stage in built if stage.batch == batch] for batch in (1, 2))
    text, stage_c, stage_b, stage_a = one
    assert [stage_c, stage_b] == [four - three for three, four in zip(costs[3][:2], costs[4][:2], strict=True)]
    assert stage_a == costs[3][2] and text == costs[3][4]
    for stage, index in (("stage_c", 1), ("stage_b", 2)):
        timed = sum(
            2 * weight.numel()
            for name, weight in getattr(networks, stage).named_parameters()
            if name.endswith(".mapper.weight") and "effnet" not in name
        )
        assert two[index] == 2 * one[index] - timed
    assert two[0] == text and two[3] == 2 * stage_a


def test_each_side_has_its_steps(built):
    stage_c, stage_b = built[2], built[4]
    assert stage_c.steps == {DIFFUSERS: 60, OURS: 60, DEFAULTS: STAGE_C.steps}
    assert stage_b.steps == {DIFFUSERS: 12, OURS: 12, DEFAULTS: STAGE_B.steps}
    assert [stage.name for stage in built] == [name for name in NAMES for _ in range(2)]
    assert all(stage.weights > 4 * 1000 for stage in built)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only what is timed moves on."""
    time = [100.0]
    monkeypatch.setattr(timing, "now", lambda device: time[0])

    def wait(seconds):
        time[0] += seconds

    return wait


def test_medians_are_of_runs_in_turn(clock):
    order, starts = [], {"one": iter([5.0, 9.0, 6.0]), "other": iter([1.0, 1.0, 50.0])}

    def run(side, step):
        def run(steps, done):
            order.append(side)
            clock(next(starts[side]))
            for _ in range(steps):
                clock(step)
                done()
            clock(0.5)

        return run

    runs = {"one": run("one", 2.0), "other": run("other", 3.0)}
    timings = time_in_turn(runs, {"one": 3, "other": 1}, rounds=3)
    assert order == ["one", "other"] * 3
    assert timings == {"one": Timing(12.5, 2.0, 3), "other": Timing(4.5, 4.5, 1)}
    assert timings["one"].seconds(10) == 12.5 + 7 * 2 and timings["one"].seconds(3) == 12.5


SECONDS = {DIFFUSERS: 4.0, OURS: 2.0, DEFAULTS: 1.0}  # a step; what comes before the first takes 10


@pytest.fixture(scope="module")
def figures(networks):
    def timed(runs, steps, rounds, device):
        assert rounds == 2
        return {side: Timing(10 + count * SECONDS[side], SECONDS[side], count) for side, count in steps.items()}

    growths = iter(range(1000, 100_000, 1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "time_in_turn", timed)
        patch.setattr(comparison, "matmul_rate", lambda dtype, device: 1e9)
        patch.setattr(comparison, "peak_growth", lambda work, device: (next(growths), None))
        return compare(networks, "tiny", Task(Geometry(128, 128), (1, 2), steps_c=20, steps_b=7), 2, timed_steps=3)


def test_a_picture_is_its_stages(figures, networks):
    for batch, one in zip((1, 2), figures["batches"], strict=True):
        assert one["batch"] == batch and [stage["stage"] for stage in one["stages"]] == NAMES
        theirs, ours, defaults = (one["pictures"][side] for side in (DIFFUSERS, OURS, DEFAULTS))
        assert theirs["seconds"] == 4 * 10 + (1 + 20 + 7 + 1) * 4
        assert ours["seconds"] == 4 * 10 + (1 + 20 + 7 + 1) * 2
        assert defaults["seconds"] == 4 * 10 + 2 * 2 + STAGE_C.steps + STAGE_B.steps  # text and Stage A are ours
        assert ours["speed"] == theirs["seconds"] / ours["seconds"] and theirs["speed"] == 1
        assert defaults["speed"] == theirs["seconds"] / defaults["seconds"]
        stage_c = one["stages"][1]
        assert stage_c["speed"] == 2 and stage_c["sides"][DIFFUSERS]["timed_steps"] == 3
        assert stage_c["sides"][OURS]["of_gemm"] == pytest.approx(stage_c["operations"] / 2 / 1e9)
        assert stage_c["sides"][DIFFUSERS]["of_gemm"] == pytest.approx(stage_c["operations"] / 4 / 1e9)
        operations = [stage["operations"] for stage in one["stages"]]
        assert ours["operations"] == operations[0] + 20 * operations[1] + 7 * operations[2] + operations[3]
        assert ours["of_gemm"] == pytest.approx(ours["operations"] / ours["seconds"] / 1e9)
        weights = sum(stage["weights"] for stage in one["stages"])
        assert ours["memory"] == weights + one["stages"][3]["sides"][OURS]["working"]  # the last is the largest
        assert theirs["memory"] == ours["memory"] - 1000


def test_the_table_says_what_the_figures_do(figures):
    figures = json.loads(json.dumps(figures))
    lines = list(table(figures))
    assert lines[0].startswith("Würstchen tiny beside diffusers 0.4")
    assert lines[0].endswith(": 128×128 pixels, float32, random weights")
    assert "1 GFLOP/s" in lines[1] and "medians of 2 runs" in lines[2] and "from 3 steps" in lines[2]
    rows = {line[:28].strip(): line[28:].split() for line in lines if "×" in line[28:]}
    assert rows["Stage C, a step"][:6] == ["4.00", "s", "2.00", "s", "2.00", "×"]
    assert rows["picture, 20 + 7 steps"][:6] == ["156", "s", "98.00", "s", "1.59", "×"]
    speed = float(rows[f"our defaults, {STAGE_C.steps} + {STAGE_B.steps} steps"][-2])
    assert speed == pytest.approx(156 / (44 + STAGE_C.steps + STAGE_B.steps), abs=0.01)
    assert not any(line != line.rstrip() or len(line) > 120 for line in lines)


def test_full_runs_are_told_of(networks, monkeypatch):
    seen = []
    monkeypatch.setattr(comparison, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(comparison, "peak_growth", lambda *_: (0, None))
    monkeypatch.setattr(
        comparison, "time_in_turn", lambda runs, steps, *_: seen.append(steps) or dict.fromkeys(steps, Timing(1, 1, 1))
    )
    figures = compare(networks, "tiny", Task(Geometry(128, 128), steps_c=5, steps_b=4), 1, None)
    assert [steps[OURS] for steps in seen] == [1, 5, 4, 1] and seen[1][DEFAULTS] == STAGE_C.steps
    assert "all of it measured" in list(table(figures))[2]


def test_the_command_writes_table_json_and_plot(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "matmul_rate", lambda dtype, device: 1e11)
    arguments = ["benchmark", "--against", "diffusers", "--model", str(tiny_folder), "--width", "128", "--height",
                 "128", "--batch", "1", "2", "--runs", "1", "--timed-steps", "2", "--json", "a.json", "--plot",
                 "a.png"]  # fmt: skip
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == list(table(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))))
    assert told.err.splitlines()[:3] == ["text encoders, batch 1", "text encoders, batch 2", "Stage C, batch 1"]
    with Image.open("a.png") as image:
        assert image.format == "PNG"


REFUSED = [
    (["--plot", "a.png"], "--plot is an option of the comparison: add --against diffusers"),
    (["--full"], "--full is an option of the comparison"),
    (["--against", "diffusers", "--width", "200"], "--width is 200: it must be a multiple of 128"),
    (["--against", "diffusers", "--batch", "1", "0"], "--batch is 0: it must be"),
    (["--against", "diffusers", "--steps-c", "0"], "--steps-c is 0: it must be"),
    (["--against", "diffusers", "--timed-steps", "0"], "--timed-steps is 0: it must be"),
    (["--against", "diffusers", "--timed-steps", "2", "--full"], "--full times every step"),
    (["--against", "diffusers", "--runs", "0"], "--runs is 0: it must be"),
    (["--against", "diffusers", "--plot", "a.jpg"], "a.jpg: pictures are written as PNG"),
    (["--against", "diffusers", "--json", "none/a.json"], "none: there is no such folder"),
    (["--against", "diffusers", "--stage-c", "c.pt"], "--stage-c is not for --against"),
    (["--against", "diffusers", "--load", "c.pt"], "--load is not for --against"),
    (["--against", "diffusers", "--size", "v2", "--model", "x"], "--size and --model are both"),
    (["--against", "diffusers", "--device", "nowhere"], "device 'nowhere' can't be used"),
]


@pytest.mark.parametrize("arguments, says", REFUSED)
def test_what_is_wrong_is_said_before_anything_is_built(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "stages", lambda *_: pytest.fail("built"))
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"wuerstchen: {says}") and error.count("\n") == 1


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_what_is_missing_is_named_with_its_extra(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["benchmark", "--against", "diffusers", "--size", "mini"]) == 2
    assert "pip install -e '.[measure]'" in capsys.readouterr().err


def test_a_size_that_diffusers_does_not_have_is_refused(networks, monkeypatch):
    with torch.device("meta"):
        odd = replace(networks, stage_a=VQGAN(StageAConfig(widths=(8, 24), bottleneck_blocks=1, codebook_size=16)))
    with pytest.raises(pipeline.WuerstchenError, match="no network of such a size: its PaellaVQModel"):
        list(stages(odd, SMALL))
