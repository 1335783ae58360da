"""Our own weight files."""

import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import wuerstchen_core as w
from wuerstchen_core.checkpoints.load import METADATA_KEY, header_tensor, load_network
from wuerstchen_core.checkpoints.sets import SET, find_set
from wuerstchen_core.models.stage_c import Prior, StageCConfig

LOADERS = {
    "stage_a": w.load_stage_a,
    "stage_b": w.load_stage_b,
    "stage_c": w.load_stage_c,
    "text_encoder_c": w.load_text_encoder,
    "semantic_compressor": w.load_semantic_compressor,
}


@pytest.mark.parametrize("role", LOADERS)
def test_what_is_saved_is_loaded(tiny_folder, tmp_path, role):
    network = LOADERS[role](tiny_folder / SET[role])
    w.save(network, tmp_path / "again.safetensors")
    again = LOADERS[role](tmp_path / "again.safetensors")
    assert again.config == network.config and not again.training
    weights = network.state_dict()
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))


def test_half_precision_files_load_in_any_precision(tiny_folder, tmp_path):
    network = w.load_stage_c(tiny_folder / SET["stage_c"])
    w.save(network, tmp_path / "half.safetensors", torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    half = w.load_stage_c(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    full = w.load_stage_c(tmp_path / "half.safetensors")
    assert half.projection.weight.dtype == torch.bfloat16 and full.projection.weight.dtype == torch.float32
    x, t, text = torch.randn(1, 16, 6, 6), torch.tensor([0.5]), torch.randn(1, 77, 32)
    ours = half(x.bfloat16(), t, text.bfloat16()).float()
    assert (ours - full(x, t, text)).norm() / ours.norm() < 0.05


def test_operations_make_the_layers(tiny_folder):
    class Counting:
        made = 0

        class Linear(torch.nn.Linear):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                Counting.made += 1

        Conv2d, ConvTranspose2d = torch.nn.Conv2d, torch.nn.ConvTranspose2d

    network = w.load_stage_b(tiny_folder / SET["stage_b"], operations=Counting)
    assert Counting.made == sum(isinstance(module, torch.nn.Linear) for module in network.modules()) > 20


def test_a_network_in_the_wrong_loader_is_named(tiny_folder):
    with pytest.raises(w.WuerstchenError, match="stage_b.safetensors: this is a stage_b file; load_stage_b takes it"):
        w.load_stage_c(tiny_folder / "stage_b.safetensors")


def damage(path, kind):
    content = path.read_bytes()
    tensors = load_file(path)
    header = {
        METADATA_KEY: json.dumps(
            {"network": "stage_c", "config": {"width": 32, "depth": 2, "heads": 2, "text_width": 32}}
        )
    }
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        path.write_text("this is no model")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "no configuration":
        save_file(tensors, path)
    elif kind == "unknown configuration":
        save_file(tensors, path, {METADATA_KEY: json.dumps({"network": "stage_c", "config": {"colour": 3}})})
    elif kind == "a tensor missing":
        tensors.pop("projection.bias")
        save_file(tensors, path, header)
    elif kind == "a tensor misshapen":
        tensors["projection.bias"] = torch.zeros(3)
        save_file(tensors, path, header)
    elif kind == "gone":
        path.unlink()


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "cut",
        "text",
        "pickle",
        "no configuration",
        "unknown configuration",
        "a tensor missing",
        "a tensor misshapen",
        "gone",
    ],
)
def test_a_bad_file_is_named_in_one_error(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    w.save(Prior(StageCConfig(width=32, depth=2, heads=2, text_width=32)), path)
    w.load_stage_c(path)
    damage(path, kind)
    with pytest.raises(w.WuerstchenError, match="bad.safetensors"):
        w.load_stage_c(path)


def test_nothing_half_written_is_left(tiny_folder, tmp_path, monkeypatch):
    network = w.load_stage_c(tiny_folder / SET["stage_c"])
    path = tmp_path / "c.safetensors"
    path.write_text("what was there before")

    def full_disk(tensors, partial, metadata):
        partial.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr("wuerstchen_core.checkpoints.load.save_file", full_disk)
    with pytest.raises(OSError):
        w.save(network, path)
    assert path.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_set_names_what_it_misses(tiny_folder, tmp_path):
    assert find_set(tiny_folder)["text_encoder_b"] == tiny_folder / "text_encoder.safetensors"
    (tmp_path / "stage_a.safetensors").touch()
    with pytest.raises(w.WuerstchenError, match="stage_b.safetensors, stage_c.safetensors, text_encoder.safetensors"):
        find_set(tmp_path)


def test_configurations_survive_as_json(tiny):
    for network in (tiny.stage_b, tiny.semantic_compressor):
        assert hash(network.config) == hash(dataclasses.replace(network.config))
        assert network.config.latent_space.to_features(torch.ones(1)).item() == 1.5


def test_a_configuration_may_be_a_tensor_beside_the_weights(tiny_folder, tmp_path):
    """As hosts write it that keep no metadata: two networks in a file, each with its own prefix."""
    tensors = {}
    for role, prefix in (("stage_b", "model.diffusion_model."), ("stage_a", "first_stage_model.")):
        network = LOADERS[role](tiny_folder / SET[role])
        changed = {"stage_a_scale": 2.5} if role == "stage_b" else {"scale_factor": 2.5}
        network.config = dataclasses.replace(network.config, **changed)
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        tensors[prefix + METADATA_KEY] = header_tensor(network)
    save_file(tensors, tmp_path / "both.safetensors")
    stage_a, stage_b = w.load_stage_a(tmp_path / "both.safetensors"), w.load_stage_b(tmp_path / "both.safetensors")
    assert stage_a.config.scale_factor == stage_b.config.stage_a_scale == 2.5
    assert stage_b.config.heads == (0, 2, 2, 2)  # which shapes do not show
    with pytest.raises(ValueError, match="stage_c"):
        w.load_stage_c(tmp_path / "both.safetensors")
    tensors["first_stage_model.wuerstchen"] = torch.tensor(list(b"{nonsense"), dtype=torch.uint8)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="bad.safetensors"):
        w.load_stage_a(tmp_path / "bad.safetensors")


def test_a_network_may_be_of_a_subclass(tiny_folder):
    class Hosted(Prior):
        pass

    network = load_network("stage_c", tiny_folder / SET["stage_c"], network=Hosted)
    assert type(network) is Hosted and not network.training


def test_the_mini_knows_the_scale_of_its_stage_a():
    pipe = w.Wuerstchen.mini()
    assert pipe.stage_b.config.stage_a_scale == pipe.stage_a.config.scale_factor
