"""Compiled blocks: LoRAs count in them without compiling anew, other sizes compile anew, and all is what it was."""

import torch

import wuerstchen_core as w
from tests.reference import distance, randomise
from wuerstchen_core.models.compiled import compile_networks
from wuerstchen_core.models.lora import Change, LoRA
from wuerstchen_core.models.stage_c import Prior, StageCConfig


def network():
    stage_c = randomise(Prior(StageCConfig(width=32, depth=1, heads=2, text_width=32)))
    for parameter in stage_c.out.parameters():
        parameter.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
    return stage_c


def output(stage_c, side):
    draw = torch.Generator().manual_seed(side)
    x, text = torch.randn(1, 16, side, side, generator=draw), torch.randn(1, 5, 32, generator=draw)
    with torch.inference_mode():
        return stage_c(x, torch.tensor([0.7]), text)


def test_loras_and_other_sizes():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain, compiled, counts = network(), network(), []
    compile_networks([compiled], backend)
    graphs.clear()
    for side in (4, 6, 4):
        assert distance(output(compiled, side), output(plain, side)) < 1e-5
        counts.append(len(graphs))
    assert counts == [3, 6, 6]
    before = output(plain, 4)
    halves = [torch.randn(4, 32) / 4, torch.randn(32, 4) / 4]
    lora = LoRA("a", {f"blocks.2.attention.to_{name}": Change(*halves, 4.0, 1.0) for name in ("q", "v")})
    with w.apply_loras(plain, [(lora, 1.0)]), w.apply_loras(compiled, [(lora, 1.0)]):
        changed = output(plain, 4)
        assert distance(changed, before) > 1e-3 and distance(output(compiled, 4), changed) < 1e-5
    assert distance(output(compiled, 4), before) < 1e-5
    assert len(graphs) == 6
