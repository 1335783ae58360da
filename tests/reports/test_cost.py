"""Parameters and operations, against formulas, published sizes, and what the pipeline does on the CPU."""

import shutil
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import wuerstchen_core as w
from wuerstchen_core.checkpoints.sets import MINI
from wuerstchen_core.cli import main
from wuerstchen_core.geometry import Geometry
from wuerstchen_core.reports.cost import Cost, operations, outline, released, stable_diffusion_costs, wuerstchen_costs


def meta(*shape, grad=False):
    return torch.empty(shape, device="meta", requires_grad=grad)


# (layer, its input, what it does in multiplications and additions)
LAYERS = [
    (lambda: nn.Linear(5, 7), (3, 11, 5), 2 * 3 * 11 * 5 * 7),
    (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 10, 12), 2 * 2 * 6 * 8 * 9 * 5 * 6),
    (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 10, 12), 2 * 2 * 16 * 9 * 10 * 12),
    (lambda: nn.Conv2d(16, 32, 3, padding=1, groups=4), (1, 16, 6, 6), 2 * 32 * (16 // 4) * 9 * 6 * 6),
    (lambda: nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1), (2, 6, 5, 3), 2 * 2 * 6 * 8 * 16 * 5 * 3),
]


@pytest.mark.parametrize("build, shape, forward", LAYERS)
def test_a_layers_gradients_cost_what_it_costs_itself_each(build, shape, forward):
    with torch.device("meta"):
        layer = build()
    assert operations(lambda: layer(meta(*shape))) == forward
    assert operations(lambda: layer(meta(*shape)).sum().backward()) == 2 * forward  # an input that is given
    assert operations(lambda: layer(meta(*shape, grad=True)).sum().backward()) == 3 * forward


@pytest.mark.parametrize("grad, times", [(False, 1), (True, 3)])
def test_attention_is_counted(grad, times):
    query, keys, values = (meta(2, 3, length, 8, grad=grad) for length in (10, 14, 14))

    def attend():
        attended = F.scaled_dot_product_attention(query, keys, values)
        if grad:
            attended.sum().backward()

    assert operations(attend) == times * 2 * (2 * 2 * 3 * 10 * 14 * 8)


@pytest.fixture(scope="module")
def networks(tiny_folder):
    return outline(tiny_folder)


@pytest.fixture(scope="module")
def costs(networks):
    """At 256x256, of one step each."""
    return wuerstchen_costs(networks, Geometry(256, 256), 1, 1)


def stage_c_by_hand(config, positions, tokens):
    """(all of Stage C, what is done once a run, what of it gets no gradient for its input), a sample"""
    c, depth, text = config.width, config.depth, config.text_width
    read = 2 * tokens * text * c
    once = read + 2 * tokens * c * c + depth * (3 * 2 * tokens * c * c)  # mapper, then kv_mapper, to_k and to_v
    timed = depth * 2 * config.time_width * 2 * c
    lifted = 2 * positions * 16 * c
    block = 2 * positions * 9 * c + 2 * 2 * positions * c * 4 * c  # depthwise and MLP
    block += 4 * 2 * positions * c * c + 2 * 2 * positions * (positions + tokens) * c  # q, k, v, out; attention
    step = lifted + depth * block + 2 * positions * c * 32
    return once, timed, step, read + timed + lifted


@pytest.mark.parametrize("width, height", [(256, 256), (384, 192)])
def test_stage_c_is_what_its_formula_says(networks, width, height):
    geometry = Geometry(width, height)
    rows, columns = geometry.stage_c
    once, timed, step, given = stage_c_by_hand(networks.stage_c.config, rows * columns, 77)
    stage_c = wuerstchen_costs(networks, geometry, steps_c=7, steps_b=1)[0]
    assert stage_c.name == "Stage C" and stage_c.sample == 3 * (once + timed + step) - given
    assert stage_c.picture == 2 * once + 7 * (timed + 2 * step)  # guidance: two texts and two latents, one time


@pytest.fixture
def count(monkeypatch):
    """What some work on the CPU does, with attention as plain products, which alone are counted there."""
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)

    def count(work):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        return counter.get_total_flops()

    return count


@pytest.mark.parametrize("width, height, steps_c, steps_b", [(256, 256, 3, 2), (192, 128, 1, 4)])
def test_a_picture_is_what_the_pipeline_does(networks, tiny, count, width, height, steps_c, steps_b):
    fresh = replace(tiny)  # which remembers no prompt
    drawn = count(lambda: fresh.generate("a", width=width, height=height, steps_c=steps_c, steps_b=steps_b))
    costs = wuerstchen_costs(networks, Geometry(width, height), steps_c, steps_b)
    assert sum(cost.picture for cost in costs) == drawn


def test_what_is_frozen_is_what_the_networks_do(networks, tiny, count):
    geometry = Geometry(320, 256)
    with torch.no_grad():
        compressed = count(lambda: tiny.semantic_compressor(torch.zeros(1, 3, *geometry.compressor)))
        encoded = count(lambda: tiny.stage_a.encode(torch.zeros(1, 3, 256, 320)))
        read = count(lambda: tiny.text_encoder_c(["a"]))
    stage_c, stage_b, stage_a = wuerstchen_costs(networks, geometry, 1, 1)[:3]
    assert stage_c.frozen == compressed + read and stage_b.frozen == compressed + read + encoded and not stage_a.frozen
    assert min(compressed, encoded, read) > 0


def test_what_is_trained_costs_about_three_passes(networks, costs):
    """Less what needs no gradient for its input."""
    forward = {
        "Stage B": lambda: networks.stage_b(meta(1, 4, 64, 64), meta(1), meta(1, 16, 6, 6), meta(1, 77, 32)),
        "Stage A": lambda: networks.stage_a.decode(networks.stage_a.encode(meta(1, 3, 256, 256))),
    }
    for cost in costs[1:3]:
        assert 2.9 < cost.sample / operations(forward[cost.name]) < 3


def test_stage_b_has_no_negative_prompt_encoded(costs, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "set")
    shutil.copy(tmp_path / "set" / "text_encoder.safetensors", tmp_path / "set" / "text_encoder_b.safetensors")
    own = wuerstchen_costs(outline(tmp_path / "set"), Geometry(256, 256), 1, 1)
    assert [cost.name for cost in costs[4:]] == ["text encoder"]
    assert [cost.name for cost in own[4:]] == ["text encoder of Stage C", "text encoder of Stage B"]
    assert own[4].picture == 2 * own[5].picture == costs[4].picture and own[:4] == costs[:4]


def test_weights_are_not_read(costs, tiny_folder, tmp_path):
    """Whatever they are, the numbers are the same."""
    shutil.copytree(tiny_folder, tmp_path / "set")
    for path in (tmp_path / "set").iterdir():
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({name: torch.full_like(tensor, -1).sqrt() if tensor.is_floating_point() else tensor
                   for name, tensor in load_file(path).items()}, path, metadata)  # fmt: skip
    with pytest.raises(w.WuerstchenError, match="not finite"):
        w.load_stage_c(tmp_path / "set" / "stage_c.safetensors")
    networks = outline(tmp_path / "set")
    assert {parameter.device.type for parameter in networks.stage_c.parameters()} == {"meta"}
    assert wuerstchen_costs(networks, Geometry(256, 256), 1, 1) == costs


def millions(network):
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def test_the_released_sizes_are_the_published_ones():
    networks = released()
    assert round(millions(networks.stage_c)) == 994
    assert round(millions(networks.stage_b)) == 1055
    assert round(millions(networks.stage_a), 1) == 18.4
    assert networks.text_encoder_c.config.width == networks.stage_c.config.text_width == 1280
    assert networks.text_encoder_b.config.width == networks.stage_b.config.text_width == 1024


def test_stable_diffusion_is_as_published():
    """And its U-Net's picture is fifty steps of a batch of two."""
    unet, vae, encoder = stable_diffusion_costs(Geometry(64, 64))
    assert unet.parameters == 865_910_724 and vae.parameters == 83_653_863 and encoder.parameters == 340_387_840
    assert 2.7 < unet.sample / (unet.picture / 50 / 2) < 3  # the text's gradient is not needed
    assert vae.picture > 0 and unet.frozen > encoder.picture / 2


@pytest.fixture
def cost(tiny_folder, capsys):
    def run(*arguments):
        assert main(["cost", "--model", str(tiny_folder), "--width", "192", "--height", "128", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_the_table_has_a_line_a_network(cost, networks, monkeypatch):
    few = [Cost("U-Net", 1_234_567, 6_000_000_000, 2_500_000_000_000, 8), Cost("VAE", 0, picture=12)]
    monkeypatch.setattr("wuerstchen_core.reports.cost.stable_diffusion_costs", lambda geometry: few)
    lines = cost("--steps-c", "5", "--steps-b", "2")
    stage_c, stage_b = wuerstchen_costs(networks, Geometry(192, 128), 5, 2)[:2]
    assert lines[0].startswith("operations at 192×128 pixels")
    assert lines[3].split() == ["Stage", "C", "0.0", "M", "0.0", "G", "0.0", "G", "0.0", "G"]
    assert [line[:20].strip() for line in lines[3:9]] == [
        "Stage C", "Stage B", "Stage A", "semantic compressor", "text encoder", "all"
    ]  # fmt: skip
    assert lines[9] == "Stage C: 5×3, 5 steps with guidance; Stage B: 48×32, 2 steps without"
    assert lines[12].split() == ["U-Net", "1.2", "M", "6.0", "G", "2.50", "T", "0.0", "G"]
    assert lines[13].split() == ["VAE", "0.0", "M", "0.0", "G"]
    assert lines[15] == "U-Net: 24×16, 50 steps with guidance"
    assert float(lines[18].split()[0]) == pytest.approx(6e9 / stage_c.sample, abs=0.01)
    assert float(lines[19].split()[0]) == pytest.approx(2.506e12 / (stage_c.sample + stage_c.frozen), abs=0.01)
    assert not any(line.endswith(" ") for line in lines)


def test_without_diffusers_its_half_is_left_out(cost, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    lines = cost()
    assert "Stage C: 5×3, 60 steps with guidance; Stage B: 48×32, 12 steps without" in lines
    assert lines[-1] == "Stable Diffusion 2.1 is left out: diffusers, which has its networks, is not installed"


def test_a_diffusers_that_cannot_be_imported_says_why(monkeypatch, cost):
    def fail(geometry):
        raise ImportError("cannot import name 'HybridCache'\nfrom 'transformers'")

    monkeypatch.setattr("wuerstchen_core.reports.cost.stable_diffusion_costs", fail)
    assert cost()[-1].endswith("has its networks, cannot be imported (cannot import name 'HybridCache')")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--width", "250"], "width is 250"),
        (["--steps-c", "0"], "--steps-c is 0: at least 1 is needed"),
        (["--steps-b", "-1"], "--steps-b is -1: at least 1 is needed"),
        (["--model", "none"], "none: not a whole set of weights"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tiny_folder, arguments, says, capsys):
    assert main(["cost", "--model", str(tiny_folder), *arguments]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"wuerstchen: {says}") and not told.out


def test_the_mini_is_a_size(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["cost", "--size", "mini", "--width", "256", "--height", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stage_c = w.load_stage_c(MINI / "stage_c.safetensors")
    assert lines[2].startswith("Würstchen mini") and lines[3].split()[2] == f"{millions(stage_c):.1f}"
