"""Weighted means of networks, and sums of LoRAs, against float64."""

import json

import pytest
import torch
from diffusers import WuerstchenPriorPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wuerstchen_core as w
from tests.checkpoints.published import prior
from tests.checkpoints.small import networks
from tests.loras import ROUNDING, outputs, pair
from tests.reference import distance
from wuerstchen_core.cli import main
from wuerstchen_core.models.stage_c import Prior, StageCConfig


def small(seed, **changes):
    torch.manual_seed(seed)
    return Prior(StageCConfig(**{"width": 64, "depth": 1, "heads": 1, "text_width": 32, **changes}))


def merged(files, out, *more):
    assert main(["merge", *map(str, files), "-o", str(out), *more]) == 0
    return load_file(out)


@pytest.fixture
def saved(tmp_path):
    def saved(network, name, dtype=None):
        w.save(network, tmp_path / name, dtype)
        return tmp_path / name

    return saved


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.75), (1.5, -0.5), (0.2, 0.3, 0.5)])
def test_networks_are_summed_in_float64(saved, tmp_path, weights):
    several = [small(seed) for seed in range(len(weights))]
    files = [saved(network, f"{i}.safetensors") for i, network in enumerate(several)]
    found = merged(files, tmp_path / "out.safetensors", "--weights", *map(str, weights))
    for name, tensor in found.items():
        exact = sum(
            weight * network.state_dict()[name].double() for weight, network in zip(weights, several, strict=True)
        )
        assert tensor.dtype == torch.float32 and torch.equal(tensor, exact.float()), name
    assert w.load_stage_c(tmp_path / "out.safetensors").config == several[0].config


def test_without_weights_it_is_the_mean_and_layouts_may_differ(tmp_path):
    ours, fused = prior(), prior(published=True)
    for parameter in fused.parameters():
        parameter.data.mul_(1.5)
    save_file(ours.state_dict(), tmp_path / "a.safetensors")
    torch.save({"ema_state_dict": fused.state_dict()}, tmp_path / "b.pt")
    found = merged([tmp_path / "a.safetensors", tmp_path / "b.pt"], tmp_path / "out.safetensors")
    first, second = (w.load_stage_c(tmp_path / name).state_dict() for name in ("a.safetensors", "b.pt"))
    assert not torch.equal(first["projection.weight"], second["projection.weight"])
    for name, tensor in found.items():
        assert torch.equal(tensor, ((first[name].double() + second[name].double()) / 2).float()), name


@pytest.mark.parametrize("kind", ["stage_a", "stage_b", "semantic_compressor", "previewer", "text_encoder"])
def test_every_kind_can_be_merged(saved, tmp_path, kind):
    """Statistics of BatchNorms as well; their number of batches is the first file's."""
    first, second = networks()[kind], networks()[kind]
    for name, tensor in second.state_dict().items():
        tensor.add_(5 if name.endswith("tracked") else 0.5)
    files = [saved(first, "a.safetensors", torch.float16), saved(second, "b.safetensors", torch.float16)]
    found = merged(files, tmp_path / "out.safetensors", "--weights", "0.75", "0.25")
    theirs = [load_file(file) for file in files]
    assert found.keys() == theirs[0].keys()
    for name, tensor in found.items():
        exact = 0.75 * theirs[0][name].double() + 0.25 * theirs[1][name].double()
        expected = exact.half() if tensor.is_floating_point() else theirs[0][name]
        assert torch.equal(tensor, expected), name
    getattr(w, f"load_{kind}")(tmp_path / "out.safetensors")


def test_dtypes_are_the_files_own_or_the_one_that_is_asked_for(saved, tmp_path):
    half, whole = saved(small(0), "a.safetensors", torch.bfloat16), saved(small(1), "b.safetensors")
    out = tmp_path / "out.safetensors"
    cases = {(half, half): torch.bfloat16, (half, whole): torch.float32}
    for files, dtype in cases.items():
        assert {tensor.dtype for tensor in merged(files, out).values()} == {dtype}
    assert {tensor.dtype for tensor in merged([half, whole], out, "--dtype", "float16").values()} == {torch.float16}


def test_what_cannot_be_merged_is_named(saved, tmp_path, capsys):
    a, b = saved(small(0), "a.safetensors"), saved(small(1), "b.safetensors")
    wide, other = saved(small(0, width=128, heads=2), "wide.safetensors"), saved(networks()["stage_a"], "x.safetensors")
    save_file(pair(), tmp_path / "lora.safetensors")
    big = small(2)
    big.out[1].bias.data.fill_(60000.0)
    big = saved(big, "big.safetensors", torch.float16)
    for arguments, says in (
        ([a], "merging needs at least two files"),
        ([a, b, "--weights", "1"], "there are 1 weights for 2 files"),
        ([a, b, "--weights", "0.5", "0.6"], "the weights of networks must sum to 1, and 0.5 0.6 sum to 1.1"),
        ([a, b, "--weights", "nan", "0.5"], "the weights must be finite numbers"),
        ([a, wide], "wide.safetensors: width is 128, and in "),
        ([a, other], "different kinds (a.safetensors: stage_c; x.safetensors: stage_a)"),
        ([a, b, "--part", "stage_b"], "there is no stage_b in all of the files, only stage_c"),
        ([a, tmp_path / "lora.safetensors"], "lora.safetensors is a LoRA, "),
        ([big, a, "--weights", "2", "-1", "--dtype", "float16"], "out.1.bias would be too large for float16"),
        ([a, tmp_path / "none"], "there is no such file"),
    ):
        assert main(["merge", *map(str, arguments), "-o", str(tmp_path / "out.safetensors")]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
        assert not (tmp_path / "out.safetensors").exists()
    assert main(["merge", str(a), str(b), "-o", str(tmp_path / "out.pt")]) == 2
    first, second = networks()["semantic_compressor"], networks()["semantic_compressor"]
    second.mapper[1].running_var.fill_(10.0)
    files = [str(saved(first, "s.safetensors")), str(saved(second, "t.safetensors"))]
    assert main(["merge", *files, "--weights", "2", "-1", "-o", str(tmp_path / "out.safetensors")]) == 2
    assert "running_var would be negative: a variance can't be" in capsys.readouterr().err


def lora(path, modules, seed, rank, alpha, **metadata):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, into) in modules.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
        tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path, {key: json.dumps(value) for key, value in metadata.items()})
    return path


Q, K = "blocks.2.attention.to_q", "blocks.5.attention.to_k"


def test_the_changes_of_loras_are_summed(tmp_path, stage_c):
    """Ranks, alphas and modules may differ; weights need not sum to 1."""
    first = lora(tmp_path / "a.safetensors", {Q: (32, 32), K: (32, 32)}, 0, rank=4, alpha=6)
    second = lora(tmp_path / "b.safetensors", {Q: (32, 32), "blocks.0.channelwise.0": (128, 32)}, 1, rank=2, alpha=1)
    out = tmp_path / "out.safetensors"
    merged([first, second], out, "--weights", "0.7", "1.2")
    found, theirs = w.load_lora(out), [w.load_lora(path) for path in (first, second)]
    assert {name: change.rank for name, change in found.changes.items()} == {Q: 6, K: 4, "blocks.0.channelwise.0": 2}
    for name, change in found.changes.items():
        exact = sum(
            weight * one.changes[name].scale * (one.changes[name].up.double() @ one.changes[name].down.double())
            for weight, one in zip((0.7, 1.2), theirs, strict=True)
            if name in one.changes
        )
        assert change.scale == 1.0
        torch.testing.assert_close(change.delta("cpu").double(), exact, rtol=1e-5, atol=1e-5)
    one_by_one = outputs(stage_c, (theirs[0], 0.7), (theirs[1], 1.2))
    assert distance(outputs(stage_c, (found, 1.0)), one_by_one) < ROUNDING
    assert distance(outputs(stage_c), one_by_one) > 0.01


def test_diffusers_reads_a_sum_of_loras_as_we_do(tmp_path, stage_c, theirs):
    """The ranks of its modules differ, of which diffusers takes the most frequent one for the alpha of all."""
    first = lora(tmp_path / "a.safetensors", {Q: (32, 32), K: (32, 32)}, 0, rank=4, alpha=6)
    second = lora(tmp_path / "b.safetensors", {Q: (32, 32)}, 1, rank=3, alpha=1)
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "pytorch_lora_weights.safetensors"
    merged([first, second], path)
    state, alphas, metadata = WuerstchenPriorPipeline.lora_state_dict(folder, return_lora_metadata=True)
    theirs.load_lora_adapter(state, prefix="prior", network_alphas=alphas, metadata=metadata)
    assert distance(outputs(stage_c, (w.load_lora(path), 1.0)), outputs(theirs)) < ROUNDING


def test_depthwise_changes_and_the_way_of_sampling(tmp_path):
    settings = {"wuerstchen_sampling": {"steps": 4, "cfg": 1.0}}
    module = "blocks.0.depthwise"
    files = [lora(tmp_path / f"{i}.safetensors", {module: (32, 9)}, i, 2, 2, **settings) for i in range(2)]
    found = merged(files, tmp_path / "out.safetensors")
    assert found[f"prior.{module}.lora_A.weight"].shape == (4, 1, 3, 3)
    assert found[f"prior.{module}.lora_B.weight"].shape == (32, 4, 1, 1)
    change = w.load_lora(tmp_path / "out.safetensors").changes[module]
    exact = sum(one.delta("cpu").double() / 2 for one in (w.load_lora(file).changes[module] for file in files))
    torch.testing.assert_close(change.delta("cpu").double(), exact, rtol=1e-5, atol=1e-5)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["wuerstchen_sampling"]) == settings["wuerstchen_sampling"]
    other = lora(tmp_path / "x.safetensors", {module: (32, 9)}, 5, 2, 2)
    merged([files[0], other], tmp_path / "out.safetensors")
    assert w.load_lora(tmp_path / "out.safetensors").sampling == {}


def test_loras_of_different_networks_are_not_merged(tmp_path, capsys):
    narrow = lora(tmp_path / "a.safetensors", {Q: (32, 32)}, 0, 2, 2)
    wide = lora(tmp_path / "b.safetensors", {Q: (64, 64)}, 0, 2, 2)
    stage_b = lora(tmp_path / "c.safetensors", {"down_blocks.1.3.attention.to_q": (32, 32)}, 0, 2, 2)
    out = ["-o", str(tmp_path / "out.safetensors")]
    for other, says in ((wide, "LoRAs of different networks can't be merged"), (stage_b, "merge LoRAs of one stage")):
        assert main(["merge", str(narrow), str(other), *out]) == 2
        assert says in capsys.readouterr().err
    assert main(["merge", str(narrow), str(narrow), "--weights", "0", "0", *out]) == 2
    assert "all weights are 0" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
