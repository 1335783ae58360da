"""The benchmark's figures, by its command."""

import os
import re
import sys

import pytest

from wuerstchen_core import save
from wuerstchen_core.cli import main
from wuerstchen_core.models.stage_c import Prior, StageCConfig


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_benchmark_times_each_stage(tiny_folder, capsys):
    assert main(["benchmark", "--runs", "1", "--model", str(tiny_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["load", "picture", "peak"]
    assert all(stage in lines[1] for stage in ("Stage C", "Stage B", "Stage A"))


def test_benchmark_tells_pictures_a_second_of_each_batch(tiny_folder, capsys):
    assert main(["benchmark", "--runs", "1", "--model", str(tiny_folder), "--batch", "1", "3"]) == 0
    *lines, threads = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ threads", threads)
    rates = []
    for line, batch in zip(lines, (1, 3), strict=True):
        told = re.fullmatch(r"batch +(\d+) +(\S+) s, +(\S+) pictures a second, (\S+) times", line)
        assert int(told[1]) == batch and float(told[3]) == pytest.approx(batch / float(told[2]), rel=0.2)
        rates.append((float(told[3]), float(told[4])))
    assert rates[0][1] == 1 and rates[1][1] == pytest.approx(rates[1][0] / rates[0][0], rel=0.1)
    assert main(["benchmark", "--load", "x.safetensors", "--batch", "2"]) == 2
    assert "--batch is an option of the comparison" in capsys.readouterr().err
    assert main(["benchmark", "--batch", "0"]) == 2


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory")
def test_benchmark_tells_what_loading_takes(tiny_folder, tmp_path, capsys):
    """Every file on a line, with its time, its size and how much of that the peak of memory was."""
    large = tmp_path / "c.safetensors"
    save(Prior(StageCConfig(width=512, depth=8, heads=8, text_width=64)), large)
    assert main(["benchmark", "--load", str(tiny_folder / "stage_a.safetensors"), str(large)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tiny_folder / 'stage_a.safetensors'}: stage_a in ")
    told = re.fullmatch(r"(.*): stage_c in (.*) s, (.*) MB, peak memory (.*) MB \((.*) of the file\)", second)
    assert told[1] == str(large) and float(told[3]) == pytest.approx(large.stat().st_size / 1e6, abs=0.1)
    assert float(told[5]) == pytest.approx(float(told[4]) / float(told[3]), abs=0.01)
    assert 0.5 < float(told[5]) < 1.15


def test_benchmark_names_what_is_no_model(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no model")
    assert main(["benchmark", "--load", "text.pt"]) == 2
    assert "text.pt: not a model" in capsys.readouterr().err


@pytest.mark.parametrize("runs", ["0", "-1"])
def test_benchmark_of_nothing_is_refused_before_anything_is_loaded(runs, capsys, monkeypatch):
    monkeypatch.setattr("wuerstchen_core.cli.measure.load_model", lambda options: pytest.fail("loaded"))
    assert main(["benchmark", "--runs", runs]) == 2
    assert f"--runs is {runs}: it must be" in capsys.readouterr().err


def test_benchmark_works_where_the_peak_is_not_known(tiny_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.delitem(sys.modules, "wuerstchen_core.reports.benchmark", raising=False)
    assert main(["benchmark", "--runs", "1", "--model", str(tiny_folder)]) == 0
    assert re.fullmatch(r"\d+ threads", capsys.readouterr().out.splitlines()[-1])
