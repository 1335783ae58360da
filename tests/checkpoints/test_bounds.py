"""What a file asks for is held against what it holds before anything is built or copied."""

import json
import time
import zipfile

import pytest
import torch
from safetensors.torch import save, save_file

import wuerstchen_core as w
from tests.checkpoints.published import decoder, prior, vqgan
from wuerstchen_core.checkpoints import pytorch_file
from wuerstchen_core.checkpoints.archive import Archive, open_archive
from wuerstchen_core.checkpoints.layouts import places
from wuerstchen_core.checkpoints.load import METADATA_KEY, load_network
from wuerstchen_core.cli import main

SECONDS = 2.0  # of computing; without the bounds it would be for ever


@pytest.fixture(autouse=True)
def at_once():
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def lie(path, kind, config):
    save_file({"x": torch.zeros(4)}, path, {METADATA_KEY: json.dumps({"network": kind, "config": config})})


@pytest.mark.parametrize(
    "kind, config",
    [
        ("stage_a", {"bottleneck_blocks": 10**6}),
        ("stage_a", {"widths": [8] * 100_000}),
        ("stage_b", {"blocks": [1, 1, 10**6, 1]}),
        ("stage_b", {"widths": [8] * 9999, "heads": [0] * 9999, "blocks": [1] * 9999, "semantic": [True] * 9999}),
        ("stage_c", {"depth": 10**6}),
        ("text_encoder", {"layers": 10**6}),
        ("semantic_compressor", {"stages": [[True, 1, 2, 8, 10**6]]}),
        ("semantic_compressor", {"stages": [[True, 1, 2, 8, 1]] * 100_000}),
        ("previewer", {"widths": [8] * 100_000}),
    ],
)
def test_a_configuration_of_more_blocks_than_tensors_is_refused(tmp_path, kind, config, capsys):
    lie(tmp_path / "bomb.safetensors", kind, config)
    with pytest.raises(
        w.WuerstchenError, match=r"bomb.safetensors: its configuration has \d+ blocks, .* only 1 tensor"
    ):
        load_network(kind, tmp_path / "bomb.safetensors")
    assert main(["inspect", str(tmp_path / "bomb.safetensors")]) == 2


@pytest.mark.parametrize(
    "kind, build, name",
    [
        ("stage_a", vqgan, "up_blocks.99999999.gammas"),
        ("stage_b", decoder, "down_blocks.99999999.0.depthwise.weight"),
        ("stage_b", decoder, "down_blocks.0.99999999.depthwise.weight"),
        ("stage_c", prior, "blocks.999999999.kv_mapper.1.weight"),
        ("stage_c", prior, "blocks." + "9" * 300 + ".kv_mapper.1.weight"),
    ],
)
def test_a_name_that_counts_beyond_the_tensors_is_refused(tmp_path, kind, build, name):
    weights = {key: tensor.contiguous() for key, tensor in build().state_dict().items()}
    save_file(weights | {name: torch.zeros(1)}, tmp_path / "bomb.safetensors")
    with pytest.raises(w.WuerstchenError, match="bomb.safetensors: "):
        load_network(kind, tmp_path / "bomb.safetensors")


@pytest.mark.parametrize(
    "shape",
    [
        "p{}.blocks.0.kv_mapper.1.weight",
        "blocks.{}.kv_mapper.1.weight",
        "down_blocks.{}.0.gammas",
        "effnet_mappers.{}.weight",
        "p.{}.blocks.0.mapper.weight",
    ],
)
def test_the_time_for_names_grows_with_their_number(tmp_path, shape):
    """They took 8 s once, and four times as many 16 times as long."""
    names = [shape.format(i) for i in range(8000)]
    (tmp_path / "many.safetensors").write_bytes(save(dict.fromkeys(names, torch.zeros(0))))
    with pytest.raises(w.WuerstchenError):
        w.load_stage_b(tmp_path / "many.safetensors")


def test_of_several_networks_the_largest_is_still_found():
    """Prefixes within others count what is within them."""
    names = ["blocks.0.kv_mapper.1.weight", "a.blocks.0.kv_mapper.1.weight", "a.b.blocks.0.kv_mapper.1.weight",
             "a.b.out.weight", "c.blocks.0.kv_mapper.1.weight"]  # fmt: skip
    sizes = [1, 2, 4, 8, 10]
    tensors = {name: torch.empty(size, device="meta") for name, size in zip(names, sizes, strict=True)}
    assert places(Archive("x", "PyTorch", tensors)) == {"stage_c": ""}
    del tensors["blocks.0.kv_mapper.1.weight"]
    assert places(Archive("x", "PyTorch", tensors)) == {"stage_c": "a."}


def laughs():
    content = {"x": torch.zeros(1)}
    for _ in range(40):
        content = {"a": content, "b": content}
    return content


def itself():
    content = {}
    content["itself"] = content
    return content


def wide():
    row = dict.fromkeys(range(3000), 0)
    return {i: row for i in range(3000)}


@pytest.mark.parametrize("build", [laughs, itself, wide, lambda: {"a" * 100_000: prior().state_dict()}])
def test_a_dictionary_that_unfolds_without_end_is_refused(tmp_path, build):
    torch.save(build(), tmp_path / "bomb.pt")
    with pytest.raises(w.WuerstchenError, match="bomb.pt: .*not a model"):
        w.load_stage_c(tmp_path / "bomb.pt")


@pytest.mark.parametrize("suffix", [".pt", ".old.pt"])
@pytest.mark.parametrize(
    "flaw, says",
    [
        (lambda tensor: torch.zeros(1).expand(tensor.shape), "repeated or overlapping"),
        (lambda tensor: torch.arange(1000.0).as_strided(tensor.shape, [1, 1]), "repeated or overlapping"),
        (lambda tensor: tensor.to_sparse(), "sparse|meta"),
        (lambda tensor: torch.empty(tensor.shape, device="meta"), "without values|meta|damaged"),
        (lambda tensor: tensor.to(torch.complex64), "of complex64 numbers"),
        (lambda tensor: tensor.to(torch.int32), "of int32 numbers"),
        (lambda tensor: tensor > 0, "of bool numbers"),
    ],
)  # fmt: skip
def test_what_is_no_plain_tensor_is_refused(tmp_path, suffix, flaw, says):
    weights = prior().state_dict()
    name = "cond_mapper.0.weight"
    weights[name] = flaw(weights[name])
    path = tmp_path / f"odd{suffix}"
    torch.save(weights, path, _use_new_zipfile_serialization=suffix == ".pt")
    with pytest.raises(w.WuerstchenError, match=says) as caught:
        w.load_stage_c(path)
    assert "odd" in str(caught.value)


def test_a_file_that_gives_its_bytes_to_many_is_refused(tmp_path):
    weights = prior().state_dict()
    everything = torch.randn(max(tensor.numel() for tensor in weights.values()))
    shared = {name: everything[: tensor.numel()].view(tensor.shape) for name, tensor in weights.items()}
    torch.save(shared, tmp_path / "shared.pt")
    with pytest.raises(w.WuerstchenError, match="shared.pt: damaged: .* bytes of weights in a file of"):
        w.load_stage_c(tmp_path / "shared.pt")


@pytest.mark.parametrize("bomb", ["version", "data.pkl", "data/0"])
def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path, bomb):
    torch.save(prior().state_dict(), tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt") as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in records.items():
            archive.writestr(name, bytes(64 << 20) if name.endswith(f"/{bomb}") else content)
    with pytest.raises(w.WuerstchenError, match="bomb.pt: not a whole PyTorch file, .*is compressed"):
        w.load_stage_c(tmp_path / "bomb.pt")


def test_a_flipped_bit_in_a_pytorch_file_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "c.pt"
    torch.save(prior().state_dict(), path)
    content = bytearray(path.read_bytes())
    place = content.find(prior().state_dict()["projection.weight"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(w.WuerstchenError, match="c.pt: damaged: .*checksum"):
        w.load_stage_c(path)


@pytest.mark.parametrize("version", ["2.4.0", "2.9.1+cpu", "2.9"])
def test_pytorch_files_are_refused_where_reading_them_is_not_safe(tmp_path, monkeypatch, version):
    torch.save(prior().state_dict(), tmp_path / "new.pt")
    torch.save(prior().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(prior().state_dict(), tmp_path / "c.safetensors")
    monkeypatch.setattr(pytorch_file.torch, "__version__", version)
    for name in ("new.pt", "old.pt"):
        with pytest.raises(w.WuerstchenError, match=f"{name}: .* before torch 2.10, .*{version[:3]}.*safetensors"):
            open_archive(tmp_path / name)
    w.load_stage_c(tmp_path / "c.safetensors")
