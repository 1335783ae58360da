"""Bad files: code in them, cut short, or no model; and odd ones that are good."""

import os
import pickle

import pytest
import torch

import wuerstchen_core as w
from tests.checkpoints.published import LOADERS, TOLERANCE, prior, run_stage_c, write
from tests.reference import distance
from wuerstchen_core.checkpoints.archive import open_archive
from wuerstchen_core.cli import main


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["trap.pt", "trap.safetensors", "trap.bin"])
@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    ],
    ids=["zip", "pickle", "legacy"],
)
def test_code_in_a_file_is_not_run(tmp_path, name, save):
    marker = tmp_path / "ran"
    save({"state_dict": prior(published=True).state_dict(), "extra": Trap(marker)}, tmp_path / name)
    for load in (*LOADERS.values(), open_archive):
        with pytest.raises(w.WuerstchenError, match=rf"{name}: .*"):
            load(tmp_path / name)
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert not marker.exists()


def test_code_in_a_file_is_said(tmp_path):
    torch.save({"state_dict": prior().state_dict(), "extra": Trap(tmp_path / "ran")}, tmp_path / "trap.pt")
    with pytest.raises(w.WuerstchenError, match=r"carries code or Python objects \(posix.system\).*none of it was run"):
        w.load_stage_c(tmp_path / "trap.pt")


def test_parameters_in_a_file_are_weights_like_others(tmp_path):
    torch.save({"state_dict": prior(published=True).requires_grad_().state_dict(keep_vars=True)}, tmp_path / "c.pt")
    for dtype in (torch.float32, torch.bfloat16):
        network = w.load_stage_c(tmp_path / "c.pt", dtype=dtype)
        assert not any(tensor.requires_grad or tensor.grad_fn for tensor in network.state_dict().values())


def test_files_before_pytorchs_zip_format_load(tmp_path):
    torch.save(prior().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert distance(run_stage_c(w.load_stage_c(tmp_path / "old.pt")), run_stage_c(prior())) < TOLERANCE


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.99, 0.99999])
def test_a_file_cut_short_is_named(tmp_path, suffix, share):
    path = write(prior().state_dict(), tmp_path / f"cut{suffix}")
    loaded = w.load_stage_c(path)
    before = run_stage_c(loaded)
    (tmp_path / "again").mkdir()
    cut = tmp_path / "again" / path.name
    cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(w.WuerstchenError, match=f"cut{suffix}: (an empty file|not a whole|not a model)"):
        w.load_stage_c(cut)
    assert torch.equal(run_stage_c(loaded), before)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "an empty file"),
        (b"this is no model", "not a model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a model"),
        (b'{"_class_name": "WuerstchenPrior"}', "not a model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3974000000\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\x05\x06" + bytes(18), "not a whole PyTorch file"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, capsys, content, says):
    path = tmp_path / "model_v2_stage_c.pt"
    path.write_bytes(content)
    for load in LOADERS.values():
        with pytest.raises(w.WuerstchenError, match=f"model_v2_stage_c.pt: {says}"):
            load(path)
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("beginning", [b"PK", b"\x80\x02", b" <", b"<"])
def test_a_safetensors_header_may_be_of_any_length(tmp_path, beginning):
    path = write(prior().state_dict(), tmp_path / "c.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    longer = int.from_bytes(beginning.ljust(2, b"\x40") + b"\x01", "little")
    header = content[8 : 8 + length].ljust(longer)
    path.write_bytes(longer.to_bytes(8, "little") + header + content[8 + length :])
    w.load_stage_c(path)


def test_a_torch_file_without_named_tensors_is_named(tmp_path):
    for content in (torch.ones(3), [torch.ones(3)], {"iter": 3}, {}):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(w.WuerstchenError, match="odd.pt: not a model"):
            w.load_stage_c(tmp_path / "odd.pt")
