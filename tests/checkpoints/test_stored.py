"""Files as the disk has them: what becomes of them after loading, who may read them, and what is no file."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import wuerstchen_core as w
from tests.checkpoints.published import as_published, on_paper, prior
from wuerstchen_core.checkpoints.archive import open_archive
from wuerstchen_core.checkpoints.layouts import part_at
from wuerstchen_core.checkpoints.safetensors_file import save_file as our_save_file
from wuerstchen_core.checkpoints.sets import find_set
from wuerstchen_core.checkpoints.stored import RegularFile
from wuerstchen_core.cli import main
from wuerstchen_core.models.stage_c import Prior, StageCConfig


def small(**sizes):
    torch.manual_seed(0)
    return Prior(StageCConfig(**{"width": 32, "depth": 1, "heads": 2, "text_width": 8} | sizes))


@pytest.mark.parametrize("name", ["ours.safetensors", "fused.safetensors", "fused.pt", "old.pt"])
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_a_loaded_network_does_not_follow_its_file(tmp_path, name, dtype):
    path = tmp_path / name
    if name == "ours.safetensors":
        w.save(small(), path)
    elif name == "fused.safetensors":
        save_file(prior(published=True).state_dict(), path)
    else:
        torch.save(prior(published=True).state_dict(), path, _use_new_zipfile_serialization=name == "fused.pt")
    network = w.load_stage_c(path, dtype=dtype)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    os.truncate(path, 100)  # what is mapped would end the process here
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path):
    path = tmp_path / "c.safetensors"
    w.save(small(), path)
    archive = open_archive(path)
    w.save(small(width=64), path)
    with pytest.raises(w.WuerstchenError, match="c.safetensors: the file was changed while it was read: load it again"):
        archive.read("projection.weight")


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_what_is_saved(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        w.save(small(), tmp_path / "c.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "c.safetensors").stat().st_mode) == mode


KILLED = """
import resource, signal, sys
import wuerstchen_core as w
from wuerstchen_core.models.stage_c import Prior, StageCConfig
network = Prior(StageCConfig(width=256, depth=1, heads=2, text_width=8))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
w.save(network, sys.argv[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the size of files that ends the process")
def test_a_killed_write_leaves_one_partial_and_nothing_else(tmp_path):
    path = tmp_path / "c.safetensors"
    child = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=os.getcwd())
    assert child.returncode == -signal.SIGXFSZ
    names = [file.name for file in tmp_path.iterdir()]
    assert len(names) == 1 and names[0].startswith(".c.safetensors.") and names[0].endswith(".partial")


def test_what_is_saved_is_safetensors_of_every_kind_of_number(tmp_path):
    tensors = {
        "a.b": torch.randn(3, 4), "half": torch.randn(5).half(), "bfloat": torch.randn(2, 2).bfloat16(),
        "none": torch.zeros(0, 3), "one": torch.tensor(7), "truth": torch.tensor([True, False, True]),
        "ü \u202e": torch.randn(1).double(), "small": torch.randn(3).to(torch.float8_e5m2),
    }  # fmt: skip
    our_save_file(tensors, tmp_path / "x.safetensors", {"a": "ä\n"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == t.dtype and read[name].shape == t.shape for name, t in tensors.items())
    assert all(torch.equal(read[name].float(), tensor.float()) for name, tensor in tensors.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"a": "ä\n"}
    ours = open_archive(tmp_path / "x.safetensors")
    assert all(torch.equal(ours.read(name).float(), tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("inside", [True, False])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, inside):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "model.safetensors"
    os.mkfifo(path)
    ended = []

    def load():
        for read in (w.load_stage_c, w.load_lora, open_archive):
            with pytest.raises(w.WuerstchenError, match="not a regular file"):
                read(path.parent if inside else path)
        ended.append(True)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(10)
    assert ended


@pytest.mark.parametrize(
    "name, says",
    [
        ("gone", "there is no such file"),
        ("file/inside", "file: an empty file"),  # and so no bundle
        ("gone/inside", "there is no such file"),
        ("n" * 300, "cannot be read"),
        ("a\0b", r"a\\x00b: not a name"),
        ("loop", "cannot be read"),
        ("/dev/zero", "not a regular file"),
    ],
)
def test_what_is_no_file_is_one_line(tmp_path, capsys, name, says):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for load in (w.load_stage_a, w.load_lora, open_archive):
        with pytest.raises(w.WuerstchenError, match=says):
            load(tmp_path / name)
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_folder_that_may_not_be_searched_is_one_line(tmp_path, monkeypatch, call):
    w.save(small(), tmp_path / "model.safetensors")
    stat_ = os.stat

    def refuse(path, *arguments, **options):
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat_(path, *arguments, **options) if call == "stat" else open(path, *arguments, **options)

    module = "wuerstchen_core.checkpoints.stored"
    monkeypatch.setattr(f"{module}.os.stat" if call == "stat" else f"{module}.open", refuse, raising=call == "stat")
    with pytest.raises(w.WuerstchenError, match=r"model.safetensors: cannot be read \(Permission denied\)"):
        w.load_stage_c(tmp_path)


def shard(weights, folder, stem="diffusion_pytorch_model", index=".safetensors.index.json"):
    names = sorted(weights)
    parts = {f"{stem}-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for part, those in parts.items():
        save_file({name: weights[name].contiguous() for name in those}, folder / part)
    places = {name: part for part, those in parts.items() for name in those}
    (folder / f"{stem}{index}").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return sorted(parts)


@pytest.mark.parametrize("given", ["folder", "index", "part"])
def test_parts_are_read_as_one_file(tmp_path, given):
    weights = prior().state_dict()
    parts = shard(weights, tmp_path)
    name = {"folder": "", "index": "diffusion_pytorch_model.safetensors.index.json", "part": parts[1]}[given]
    network = w.load_stage_c(tmp_path / name)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in network.state_dict().items())
    assert main(["inspect", str(tmp_path / name)]) == 0


def test_parts_that_are_not_all_there_are_named(tmp_path):
    parts = shard(prior().state_dict(), tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    (tmp_path / parts[2]).unlink()
    with pytest.raises(w.WuerstchenError, match=f"{parts[2]}: there is no such file"):
        w.load_stage_c(tmp_path)
    for other in ("../out.safetensors", "/etc/passwd", "..", "a\\b"):
        index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {"projection.bias": other}}))
        with pytest.raises(w.WuerstchenError, match="index.json: it lists .*, which is not beside it"):
            w.load_stage_c(index)
    index.write_text(json.dumps({"weight_map": {"elsewhere": parts[0]}}))
    with pytest.raises(w.WuerstchenError, match=f"{parts[0]}: incomplete, elsewhere is missing"):
        w.load_stage_c(index)
    index.unlink()
    with pytest.raises(w.WuerstchenError, match=r"one part of several \(sharded\); .*index.json, .* is missing"):
        w.load_stage_c(tmp_path / parts[0])


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"])
def test_half_precision_in_a_folder_is_found(tmp_path, name):
    weights = prior().half().state_dict()
    save_file(weights, tmp_path / name)
    network = w.load_stage_c(tmp_path, dtype=None)
    assert torch.equal(network.projection.weight, weights["projection.weight"])


@pytest.mark.parametrize("more", ["blocks.0.channelwise.0.scale_weight", "scaled_fp8", "out.1.weight_scale"])
def test_comfyuis_scaled_weights_are_named(tmp_path, more):
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in prior().state_dict().items()}
    save_file(weights, tmp_path / "plain.safetensors")
    network = w.load_stage_c(tmp_path / "plain.safetensors")
    assert torch.equal(network.out[1].bias, weights["out.1.bias"].float())
    save_file(weights | {more: torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(w.WuerstchenError, match=rf"scaled 8-bit numbers \({more}, .*take the file in float16"):
        w.load_stage_c(tmp_path / "c.safetensors")


def test_eight_bit_weights_that_are_not_finite_are_named(tmp_path):
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in prior().state_dict().items()}
    weights["out.1.bias"][3] = torch.nan
    save_file(weights, tmp_path / "c.safetensors")
    for dtype in (torch.float32, None):
        with pytest.raises(w.WuerstchenError, match="damaged weights, out.1.bias is not finite"):
            w.load_stage_c(tmp_path / "c.safetensors", dtype=dtype)


def test_a_released_network_without_its_last_blocks_is_incomplete():
    archive = on_paper(lambda: as_published(WuerstchenPrior(c=1536, c_cond=1280, depth=31, nhead=24)))
    with pytest.raises(w.WuerstchenError, match="an incomplete stage_c file: it has 31 of the 32 groups of blocks"):
        part_at(archive, "stage_c", "")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    archive = on_paper(lambda: CLIPTextModel(CLIPTextConfig(**sizes)))
    prefix = next(iter(archive.tensors)).partition("embeddings.")[0]
    with pytest.raises(w.WuerstchenError, match="an incomplete text_encoder file: it has 23 of the 24 layers"):
        part_at(archive, "text_encoder", prefix)


def test_a_regular_file_is_read_by_position(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    file = RegularFile(tmp_path / "x")
    assert file.size == 100 and bytes(file.read(10, 5)) == bytes(range(10, 15)) and not file.read(3, 0)


def test_a_set_in_a_folder_that_may_not_be_searched_is_one_line(tmp_path, monkeypatch):
    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("wuerstchen_core.checkpoints.stored.os.stat", refuse)
    with pytest.raises(w.WuerstchenError, match=r"cannot be read \(Permission denied\)"):
        find_set(tmp_path)
    monkeypatch.undo()
    for name in ("a\0b", "n" * 300):
        with pytest.raises(w.WuerstchenError, match="cannot be read|not a name"):
            find_set(tmp_path / name)


def test_a_refused_sparse_tensor_leaves_torchs_own_loader_as_it_was(tmp_path):
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (2,))
    torch.save({"blocks.0.weight": sparse}, tmp_path / "sparse.pt")
    with pytest.raises(w.WuerstchenError):
        w.load_stage_c(tmp_path / "sparse.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt", _use_new_zipfile_serialization=False)
    assert torch.load(tmp_path / "other.pt", weights_only=True)["a"].tolist() == [1.0, 1.0]
