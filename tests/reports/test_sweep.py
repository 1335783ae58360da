"""The sweep's figures by their definitions, and what it writes."""

import itertools
import json

import pytest
import torch

from wuerstchen_core.reports.sweep import Setting, distance, energy_distance, grid, plot, sweep, table
from wuerstchen_core.util.errors import WuerstchenError
from wuerstchen_core.util.json_file import write_json


def test_the_energy_distance_is_its_definition():
    torch.manual_seed(0)
    ours, theirs = torch.randn(3, 4, 2, 5), torch.randn(3, 6, 2, 5) + 1

    def mean(pairs):
        pairs = list(pairs)
        return sum((one - other).norm().item() for one, other in pairs) / len(pairs)

    across = mean(pair for a, b in zip(ours, theirs, strict=True) for pair in itertools.product(a, b))
    within, spread = (mean(pair for one in set for pair in itertools.permutations(one, 2)) for set in (ours, theirs))
    assert energy_distance(ours, theirs) == pytest.approx((2 * across - within - spread) / spread, rel=1e-5)


def test_the_energy_distance_tells_less_spread_and_not_other_draws():
    torch.manual_seed(1)
    one, same, narrow = torch.randn(40, 8, 16), torch.randn(40, 8, 16), torch.randn(40, 8, 16) * 0.6
    assert abs(energy_distance(one, same)) < 0.02 < 0.04 < energy_distance(narrow, one)
    with pytest.raises(WuerstchenError, match="2 draws"):
        energy_distance(one[:, :1], one)


def test_the_distance_is_relative():
    theirs = torch.full((2, 1, 4), 2.0)
    assert distance(torch.tensor([2.5, 3.0]).view(2, 1, 1).expand(2, 1, 4), theirs) == pytest.approx((0.25 + 0.5) / 2)


def test_a_sweep_has_a_row_for_each_setting_against_both_references(tmp_path):
    asked = []

    def draw(setting, seed):
        asked.append((setting, seed))
        generator = torch.Generator().manual_seed(seed + setting.steps)
        return torch.randn(2, 3, 4, generator=generator) + 1 / setting.steps

    settings = grid(["ddim", "ddpm"], ["even"], [2, 100])
    rows = list(sweep(draw, settings, lambda latents: {"mean": latents.mean().item()}, 100))
    assert asked[:2] == [(Setting("dpmpp_2m", "even", 100), 0), (Setting("ddpm", "even", 100), 1)]
    assert [(row["sampler"], row["steps"]) for row in rows] == [("ddim", 2), ("ddim", 100), ("ddpm", 2), ("ddpm", 100)]
    assert rows[0]["distance"] > 0.1 and rows[1]["distance"] == 0 and rows[2]["distance"] is None
    assert rows[3]["mean"] == draw(settings[3], 0).mean().item()
    lines = list(table(rows))
    assert len(lines) == 6 and lines[0] == "| sampler | schedule | steps | distance | energy | mean |"
    write_json(tmp_path / "s.json", {"stage": "c", "rows": rows})
    assert json.loads((tmp_path / "s.json").read_text()) == {"stage": "c", "rows": rows}
    plot(tmp_path / "s.png", rows, "Stage C")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
