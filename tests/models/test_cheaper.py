"""What makes a step cheap changes no result: in place, in parts, joined and compiled, against plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from tests.reference import distance, randomise
from wuerstchen_core import WuerstchenError
from wuerstchen_core.models import blocks, compiled, stage_a
from wuerstchen_core.models.compiled import CUDAGraphs, compile_networks
from wuerstchen_core.models.stage_a import VQGAN, MixingBlock, StageAConfig
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig
from wuerstchen_core.models.stage_c import Prior, StageCConfig

STAGE_B = StageBConfig(
    widths=(16, 32), heads=(0, 2), blocks=(2, 3), semantic=(False, True), condition_width=24, text_width=32
)


def apart(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


def response_norm(x, gamma, beta):
    """ConvNeXt V2's equations, in float64; x (B, H, W, C)"""
    x = x.double()
    norm = x.pow(2).sum(dim=(1, 2), keepdim=True).sqrt()
    return gamma.double() * (x * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))) + beta.double() + x


@pytest.mark.parametrize("cached", [1, 100, 1 << 18])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str
)
def test_response_norm_in_parts_is_the_formula(monkeypatch, cached, dtype, tolerance):
    """With values whose squares float16 cannot hold, and whose sum bfloat16 would round away."""
    monkeypatch.setattr(blocks, "CACHED", cached)
    network = randomise(blocks.GlobalResponseNorm(24)).to(dtype)
    x = (200 * torch.randn(2, 40, 30, 24) * torch.rand(24)).to(dtype)
    expected = response_norm(x, network.gamma, network.beta)
    given = x.clone()
    assert apart(network(given.clone()), expected) < tolerance  # where gradients are recorded
    with torch.no_grad():
        result = network(given)
    assert result.dtype == dtype and apart(result, expected) < tolerance
    assert result.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("numbers", [1, 700, 1 << 21])
def test_stage_a_in_parts_is_the_whole(monkeypatch, numbers):
    """As Paella has the block: both halves behind a LayerNorm, scaled, shifted and gated by the six gammas."""
    monkeypatch.setattr(stage_a, "MLP_NUMBERS", numbers)
    block = randomise(MixingBlock(8)).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)

    def norm(x, scale, shift):
        return (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    g, conv, (widen, _, narrow) = block.gammas, block.depthwise[1], block.channelwise
    padded = F.pad(norm(x, g[0], g[1]), (1, 1, 1, 1), mode="replicate")
    h = x + F.conv2d(padded, conv.weight, conv.bias, groups=8) * g[2]
    inner = norm(h, g[3], g[4]).permute(0, 2, 3, 1)
    expected = h + narrow(F.gelu(widen(inner))).permute(0, 3, 1, 2) * g[5]
    given = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert apart(block(given), expected) < 1e-12
    assert torch.equal(given, x)  # what comes in is not worked on in place
    assert apart(block(given), expected) < 1e-12


def networks():
    torch.manual_seed(0)
    c = randomise(Prior(StageCConfig(width=32, depth=3, heads=2, text_width=32)))
    for parameter in c.out.parameters():
        parameter.mul_(0.1)  # clear of the pole of (x - a) / |1 - b|
    return c, randomise(DiffNeXt(STAGE_B)), randomise(VQGAN(StageAConfig(widths=(8, 16), bottleneck_blocks=3)))


def run(c, b, a):
    draw, dtype = torch.Generator().manual_seed(1), c.projection.weight.dtype
    semantic, x, text = (torch.randn(2, *size, generator=draw).to(dtype) for size in ((16, 6, 6), (4, 32, 32), (5, 32)))
    t = torch.tensor([0.9, 0.4])
    return [c(semantic, t, text), b(x, t, semantic, text), a.decode(x)]


@pytest.mark.parametrize("index", range(3), ids=["c", "b", "a"])
def test_gradients_are_those_of_what_is_drawn(index):
    """With and without a gradient the same is computed, and the gradient is its derivative: a step along it rises as
    steeply as its length says."""
    nets = [network.double().requires_grad_(True) for network in networks()]

    def value():
        return run(*nets)[index].square().mean()

    loss = value()
    loss.backward()
    gradients = [(p, p.grad) for p in nets[index].parameters() if p.grad is not None]
    square = sum(gradient.square().sum() for _, gradient in gradients)
    step = 1e-5 * loss.detach() / square
    with torch.no_grad():
        assert value().item() == pytest.approx(loss.item(), rel=1e-12)
        for parameter, gradient in gradients:
            parameter.add_(step * gradient)
        assert (value() - loss).item() == pytest.approx((step * square).item(), rel=1e-2)


def test_blocks_of_one_shape_are_compiled_once():
    """Counted by a backend of its own: 3 kinds of block in Stage C, 2 in Stage A's decoder; in Stage B ResBlocks of 2
    levels and one with the way down's output, TimestepBlocks of 2 levels and AttnBlocks of one."""
    plain, counted, compiled_ones = networks(), [0], networks()

    def backend(graph, inputs):
        counted[0] += 1
        return graph.forward

    compile_networks(compiled_ones, backend)
    counted[0] = 0
    with torch.inference_mode():
        expected, results = run(*plain), run(*compiled_ones)
        assert counted[0] == 3 + 2 + (3 + 2 + 1)
        again = run(*compiled_ones)
    assert counted[0] == 3 + 2 + (3 + 2 + 1)
    for one, other, once_more in zip(expected, results, again, strict=True):
        assert distance(other, one) < 1e-5 and torch.equal(other, once_more)


def test_without_a_compiler_there_is_one_line(monkeypatch):
    def missing(graph, inputs):
        raise RuntimeError("no C++ compiler\nand a long stack")

    says = "^torch.compile does not work here .*no C.. compiler.*: it needs a C.. compiler"
    with pytest.raises(WuerstchenError, match=says) as told:
        compile_networks(networks(), missing)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


class Recorded:
    """A CUDA graph as far as it shows: what is recorded is computed anew, in the same memory, at each replay."""

    captured = None

    def replay(self):
        denoise, inputs, result = self.captured
        result.copy_(denoise(*inputs))


def test_a_run_is_recorded_at_its_second_step_and_replayed(monkeypatch):
    calls, recording = [], []

    def step(x, modulation, condition):
        return (x * modulation[0] + condition[0]).sin()

    def denoise(*inputs):
        calls.append(inputs)
        result = step(*inputs)
        if recording:
            recording.pop().captured = (step, inputs, result)
        return result

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            recording.append(self.graph)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(compiled.torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(compiled.torch.cuda, "graph", Capture)
    graphs, results = CUDAGraphs(denoise), []
    runs = [([torch.full((1,), 0.5 + n)], 2 if n == 2 else 1) for n in range(3)]  # the last one of another batch
    for condition, batch in runs:
        for number in range(4):
            x, modulation = torch.randn(batch, 3), [torch.full((1,), float(number))]
            results.append((graphs(x, modulation, condition), step(x, modulation, condition)))
    assert len(calls) == 2 * len(runs)  # its first step, and the recording
    for result, expected in results:  # none was overwritten by a later step
        assert torch.equal(result, expected)


def test_on_a_cpu_there_are_no_graphs():
    nets = networks()
    compile_networks(nets, lambda graph, inputs: graph.forward)
    assert not any(isinstance(vars(network).get("denoise"), CUDAGraphs) for network in nets)
