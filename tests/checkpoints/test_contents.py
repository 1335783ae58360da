"""Written in several parts, and in float8."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import wuerstchen_core as w
from tests.checkpoints.published import prior
from wuerstchen_core.checkpoints.contents import size_in_bytes
from wuerstchen_core.checkpoints.sets import MINI, SET
from wuerstchen_core.cli import main
from wuerstchen_core.models.stage_c import Prior, StageCConfig


@pytest.fixture
def whole(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "c.safetensors"
    w.save(Prior(StageCConfig(width=192, depth=1, heads=3, text_width=136)), path, torch.float16)
    return path


def test_parts_hold_every_tensor_once_and_are_read_as_one(whole, tmp_path, capsys):
    out = tmp_path / "parts"
    out.mkdir()
    arguments = ["convert", str(whole), "-o", str(out / "c.safetensors"), "--shard-size", "200KB"]
    assert main(arguments) == 0
    index = out / "c.safetensors.index.json"
    parts = sorted(out.glob("*.safetensors"))
    assert capsys.readouterr().out.split() == [str(index), *map(str, parts)]
    assert [path.name for path in parts] == [
        f"c-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)
    ]
    expected, listed = load_file(whole), json.loads(index.read_text())
    assert listed["weight_map"].keys() == expected.keys()
    held = {name: path.name for path in parts for name in load_file(path)}
    assert held == listed["weight_map"]
    assert listed["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for path in parts:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 200_000 or len(tensors) == 1
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    for path in (index, parts[0]):
        ours, theirs = w.load_stage_c(path), w.load_stage_c(whole)
        assert ours.config == theirs.config
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert main(["convert", str(index), "-o", str(tmp_path / "one.safetensors"), "--shard-size", "2GB"]) == 0
    assert (tmp_path / "one.safetensors").read_bytes() == whole.read_bytes()
    before = [path.read_bytes() for path in (index, *parts)]
    assert main(["convert", str(index), *arguments[2:]]) == 0  # onto itself
    assert before == [path.read_bytes() for path in (index, *parts)]


def test_a_bundle_may_be_in_parts(tiny_folder, tmp_path):
    out = tmp_path / "set.safetensors"
    assert main(["convert", str(tiny_folder), "--bundle", "-o", str(out), "--shard-size", "3MB"]) == 0
    index = tmp_path / "set.safetensors.index.json"
    assert not out.exists() and len(list(tmp_path.glob("set-*.safetensors"))) > 1
    size = {"width": 64, "height": 64, "steps_c": 2, "steps_b": 1}
    drawn = w.Wuerstchen.from_file(index).generate("a cat", **size)
    assert torch.equal(drawn, w.Wuerstchen.from_folder(tiny_folder).generate("a cat", **size))


def test_parts_that_cannot_all_be_written_leave_those_that_were_there(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "parts"
    out.mkdir()
    arguments = ["-o", str(out / "c.safetensors"), "--shard-size", "200KB"]
    assert main(["convert", str(whole), *arguments]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    broken = load_file(whole)
    broken["out.1.bias"] = torch.full_like(broken["out.1.bias"], float("nan"))  # the last one
    save_file(broken, tmp_path / "nan.safetensors")
    assert main(["convert", str(tmp_path / "nan.safetensors"), *arguments]) == 2
    assert "not finite" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    "places, says",
    [
        ({"a": ""}, "it lists , which is not beside it"),
        ({"a": "../c.safetensors"}, "which is not beside it"),
        ({"a": "/etc/passwd"}, "which is not beside it"),
        ({"a": "..\\c.safetensors"}, "which is not beside it"),
        ({"a": ".."}, "which is not beside it"),
        ({"a": "nowhere.safetensors"}, "nowhere.safetensors: there is no such file"),
        ({"a": "c.safetensors"}, "incomplete, a is missing"),
        ({"a": 3}, "not a list of the parts"),
        ({"a": "x.safetensors.index.json"}, "not a model"),
        ({"a": "a\0b"}, "not a name that a file can have"),
    ],
)
def test_hostile_lists_of_parts(whole, tmp_path, places, says):
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(w.WuerstchenError, match=says):
        w.load_stage_c(index)
    index.write_text('{"weight_map": {"out.1.bias": "c.safetensors", "out.1.bias": "d.safetensors"}}')
    with pytest.raises(w.WuerstchenError, match="is in it twice"):
        w.load_stage_c(index)


def test_a_tensor_in_two_parts_is_the_one_that_is_listed(tmp_path):
    weights = prior(published=True).state_dict()
    first = {name: tensor for name, tensor in weights.items() if name.startswith("blocks.")}
    rest = {name: tensor for name, tensor in weights.items() if name not in first}
    save_file(first | {"out.1.bias": torch.full_like(weights["out.1.bias"], 7.0)}, tmp_path / "a.safetensors")
    save_file(rest, tmp_path / "b.safetensors")
    places = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    bias = w.load_stage_c(tmp_path / "x.safetensors.index.json").state_dict()["out.1.bias"]
    assert torch.equal(bias, weights["out.1.bias"])


def test_sizes_are_read_as_people_write_them():
    sizes = {"2GB": 2 * 10**9, "500 mb": 5 * 10**8, "1.5GiB": 3 << 29, "7": 7, "10kb": 10**4}
    assert {text: size_in_bytes("x", text) for text in sizes} == sizes
    for text in ("", "GB", "-1GB", "0GB", "1PB", "1e9", "9999999999TB", "2 G B"):
        with pytest.raises(w.WuerstchenError, match=f"--shard-size is '{text}': it must be a size such as 2GB"):
            size_in_bytes("--shard-size", text)


def test_float8_is_for_large_matrices(whole, tmp_path):
    path = tmp_path / "small.safetensors"
    assert main(["convert", str(whole), "-o", str(path), "--dtype", "float8_e4m3fn"]) == 0
    exact, stored = load_file(whole), load_file(path)
    large = {name for name, tensor in exact.items() if tensor.dim() > 1 and min(tensor.flatten(1).shape) >= 128}
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn} == large
    assert "blocks.0.channelwise.0.weight" in large and "cond_mapper.0.weight" in large
    for name in ("blocks.0.depthwise.weight", "blocks.0.channelwise.2.gamma", "out.1.weight", "blocks.1.mapper.weight"):
        assert name not in large and torch.equal(stored[name], exact[name]), name
    for name in large:
        torch.testing.assert_close(stored[name].float(), exact[name].float(), rtol=2**-4, atol=2**-10)
    for dtype in (torch.float32, torch.bfloat16):
        network = w.load_stage_c(path, dtype=dtype)
        assert {tensor.dtype for tensor in network.state_dict().values()} == {dtype}
    assert main(["convert", str(path), "-o", str(tmp_path / "back.safetensors"), "--dtype", "float16"]) == 0
    for name, tensor in load_file(tmp_path / "back.safetensors").items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor.float(), stored[name].float())


def test_the_minis_files_are_converted_bit_by_bit(tmp_path):
    for name in ("stage_a", "semantic_compressor", "previewer"):
        assert main(["convert", str(MINI / SET[name]), "-o", str(tmp_path / "x.safetensors")]) == 0
        assert (tmp_path / "x.safetensors").read_bytes() == (MINI / SET[name]).read_bytes()
