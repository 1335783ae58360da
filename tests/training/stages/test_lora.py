"""A LoRA's training: what it learns, and that diffusers reads it."""

import dataclasses
import json
import re

import pytest
import torch
from diffusers import WuerstchenPriorPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import wuerstchen_core as w
from tests.loras import ATTENTION, EVERYTHING, ROUNDING, STAGE_C, inputs, outputs, same_bits
from tests.reference import distance
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.cli import main
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.training.stages import lora as training_lora
from wuerstchen_core.training.stages.lora import TARGETS, add_lora, save_lora


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING, ["blocks.2.attention.to_q", "kv_mapper.1"]])
def test_what_training_writes_is_read_by_us_and_by_diffusers(tiny_folder, stage_c, theirs, tmp_path, targets):
    trained = w.load_stage_c(tiny_folder / STAGE_C)
    parameters = add_lora(trained, rank=3, alpha=7.5, targets=targets)
    torch.testing.assert_close(outputs(trained), outputs(stage_c), rtol=0, atol=0)  # at first it changes nothing
    torch.manual_seed(0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(trained, tmp_path / "pytorch_lora_weights.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    lora = w.load_lora(tmp_path)
    assert {(change.rank, change.alpha, change.scale) for change in lora.changes.values()} == {(3, 7.5, 2.5)}
    assert len(lora.changes) == {4: 8, 12: 20, 2: 3}[len(targets)] == len(parameters) / 2
    state, alphas, metadata = WuerstchenPriorPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    theirs.load_lora_adapter(state, prefix="prior", network_alphas=alphas, metadata=metadata)
    ours = outputs(stage_c, (lora, 1.0))
    assert distance(ours, outputs(trained)) < ROUNDING and distance(ours, outputs(theirs)) < ROUNDING
    assert distance(ours, outputs(stage_c)) > 0.002


def test_only_the_lora_is_trained_and_in_float32(tiny_folder, tmp_path):
    network = w.load_stage_c(tiny_folder / STAGE_C, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in network.named_parameters()}
    parameters = add_lora(network, rank=2, alpha=2)
    assert len(parameters) == 16 and {parameter.dtype for parameter in parameters} == {torch.float32}
    assert sum(parameter.requires_grad for parameter in network.parameters()) == 16
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    x, t, text = inputs()
    for _ in range(2):  # the first half gets no gradient while the second is zero
        optimizer.zero_grad()
        network(x.bfloat16(), t, text.bfloat16()).float().square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in network.named_parameters()}
    assert all(tensor.equal(kept[name]) for name, tensor in before.items())
    save_lora(network, tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora.safetensors").values()} == {torch.float32}
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert set(file.keys()) > {"prior.blocks.2.attention.to_q.lora_A.weight"}
        assert json.loads(file.metadata()["lora_adapter_metadata"])["prior.lora_alpha"] == 2


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rank": 0, "alpha": 1}, "rank is 0"),
        ({"rank": 4, "alpha": 0}, "alpha is 0"),
        ({"rank": 4, "alpha": 1, "targets": ["to_q", "to_x"]}, "to_x: there is no such module"),
        ({"rank": 4, "alpha": 1, "targets": ["depthwise"]}, "depthwise: there is no such module.*channelwise.0"),
        ({"rank": 4, "alpha": 1, "targets": ["o_q"]}, "o_q: there is no such module"),
        ({"rank": 4, "alpha": 1, "targets": []}, "no targets"),
    ],
)
def test_what_cannot_be_trained_is_named(options, says):
    network = Prior(StageCConfig(width=32, depth=1, heads=2, text_width=32))
    names = list(network.state_dict())
    with pytest.raises(w.WuerstchenError, match=says):
        add_lora(network, **options)
    assert list(network.state_dict()) == names


@pytest.fixture
def teach(tiny_folder, emoji, tmp_path, monkeypatch):
    """teach(folder, **options): trains on three emoji in two styles, and gives what wuerstchen train returns."""
    monkeypatch.chdir(tmp_path)
    files = {
        "init": tiny_folder / STAGE_C,
        "text_encoder": tiny_folder / SET["text_encoder_c"],
        "semantic_compressor": tiny_folder / SET["semantic_compressor"],
        "stage_a": tiny_folder / SET["stage_a"],
        "stage_b": tiny_folder / SET["stage_b"],
    }
    few = {"data": emoji, "size": 64, "batch": 2, "workers": 0, "warm_up": 0, "cool_down": 0, "learning_rate": 0.01,
           "steps": 4, "save_every": 2, "ema_every": 1, "sample_every": 0, "rank": 3, "alpha": 6}  # fmt: skip

    def teach(folder, **options):
        options = files | few | {"folder": folder} | options
        given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return main(["train", "lora", "--config", "mini", *given])

    return teach


def checkpoint(folder):
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("targets", ['["to_q", "to_out.0"]', json.dumps(EVERYTHING)])
def test_a_trained_lora_does_here_and_in_diffusers_what_its_average_does(
    teach, tiny_folder, stage_c, theirs, tmp_path, targets
):
    before = (tiny_folder / STAGE_C).read_bytes()
    assert teach("run", targets=targets) == 0
    assert (tiny_folder / STAGE_C).read_bytes() == before
    lora = w.load_lora("run/lora.safetensors")
    assert {(change.rank, change.alpha) for change in lora.changes.values()} == {(3, 6)}

    averaged = w.load_stage_c(tiny_folder / STAGE_C)
    add_lora(averaged, rank=3, alpha=6, targets=json.loads(targets))
    learned = {name.removeprefix("base.network."): value for name, value in checkpoint("run")["averaged"].items()}
    assert learned.keys() == {name for name, value in averaged.named_parameters() if value.requires_grad}
    averaged.load_state_dict(learned, strict=False)

    state, alphas, metadata = WuerstchenPriorPipeline.lora_state_dict(
        tmp_path / "run", weight_name="lora.safetensors", return_lora_metadata=True
    )
    theirs.load_lora_adapter(state, prefix="prior", network_alphas=alphas, metadata=metadata)
    ours = outputs(stage_c, (lora, 1.0))
    assert distance(ours, outputs(averaged)) < ROUNDING and distance(ours, outputs(theirs)) < ROUNDING
    assert distance(ours, outputs(stage_c)) > 1e-3


def test_the_weights_under_a_lora_stay_as_they_are_and_are_in_no_checkpoint(teach, stage_c, monkeypatch):
    tasks = []
    build = training_lora.build
    monkeypatch.setattr(training_lora, "build", lambda *given: tasks.append(build(*given)) or tasks[0])
    assert teach("run") == 0
    (task,) = tasks
    kept = {name.replace(".base_layer", ""): value for name, value in task.base.network.state_dict().items()}
    assert same_bits(stage_c, {name: kept[name] for name in stage_c.state_dict()})
    state = checkpoint("run")
    names = {name for name, value in task.named_parameters() if value.requires_grad}
    assert len(names) == 2 * 8 and all("lora_" in name for name in names)
    assert state["weights"].keys() == state["averaged"].keys() == state["optimizer"].keys() == names
    assert all(state["weights"][name].any() for name in names)
    assert any(not state["weights"][name].equal(state["averaged"][name]) for name in names)


def test_a_lora_goes_on_as_if_never_stopped(teach):
    assert teach("whole") == 0
    assert teach("parts", steps=2) == 0
    between = load_file("parts/lora.safetensors")
    assert teach("parts") == 0
    whole, parts = load_file("whole/lora.safetensors"), load_file("parts/lora.safetensors")
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)
    assert any(not whole[name].equal(between[name]) for name in whole)
    weights = checkpoint("whole")["weights"], checkpoint("parts")["weights"]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_a_lora_learns_stage_cs_loss_and_is_sampled_with(teach, tiny_folder, emoji, tmp_path):
    """Before its first step it is Stage C's to the bit: it changes nothing yet."""
    from wuerstchen_core.training.data.options import DataOptions
    from wuerstchen_core.training.loop.draws import Draws
    from wuerstchen_core.training.stages import stage_c as training_stage_c

    data = DataOptions(data=str(emoji), size=64, batch=2, workers=0)
    files = {"init": str(tiny_folder / STAGE_C), "text_encoder": str(tiny_folder / SET["text_encoder_c"]),
             "semantic_compressor": str(tiny_folder / SET["semantic_compressor"])}  # fmt: skip
    tasks = [
        training_stage_c.build(training_stage_c.Options(**files), data),
        training_lora.build(training_lora.Options(**files), data),
    ]
    batch = next(data.open(0))
    batch["image"] = batch["image"].float() / 255
    losses = [task(batch | {"features": task.features(batch)}, Draws(0, 0, 2))["noise"] for task in tasks]
    assert losses[0].equal(losses[1])
    assert tasks[0].feature_files == tasks[1].feature_files and len(tasks[1].frozen) == 2
    assert teach("run", steps=1, sample_every=1, sample_steps=1, prompts='["a disc", "a cat"]') == 0
    assert Image.open("run/samples/0000001.png").size == (2 * 64 + 12, 64 + 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_lora_is_written_in_the_precision_asked_for(teach, dtype):
    assert teach("run", steps=1, dtype=str(dtype).removeprefix("torch.")) == 0
    assert {tensor.dtype for tensor in load_file("run/lora.safetensors").values()} == {dtype}


@pytest.mark.parametrize(
    "options, says",
    [
        ({"init": "none.safetensors"}, "init: there is no none.safetensors"),
        ({"init": ""}, "init is missing"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": '["to_x"]'}, "to_x: there is no such module"),
        ({"network.depth": 3}, "unrecognized arguments: --network.depth"),
        ({"init": "mini"}, "text_encoder: .* gives texts of width 32, but this Stage C reads 192"),
    ],
)
def test_what_a_lora_cannot_be_trained_with_is_named(teach, tmp_path, options, says, capsys):
    try:
        assert teach("run", **options) == 2
    except SystemExit as exit:
        assert exit.code == 2
    assert re.search(says, capsys.readouterr().err.splitlines()[-1]) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["mini", "v2"])
def test_the_shipped_configurations_are_whole(size):
    from wuerstchen_core.training.command import CONFIGS, RunOptions
    from wuerstchen_core.training.data.options import DataOptions
    from wuerstchen_core.training.loop.plan import Plan
    from wuerstchen_core.training.options import load, read_all

    path = str(CONFIGS / size / "lora.toml")
    table = load(path)
    _, _, plan, options = read_all((RunOptions, DataOptions, Plan, training_lora.Options), table, path)
    assert options.targets == TARGETS and plan.dtype == "float32" and options.init == table.get("init", "mini")
    known = {field.name for cls in (RunOptions, DataOptions, Plan, training_lora.Options)
             for field in dataclasses.fields(cls) if field.init}  # fmt: skip
    assert table.keys() <= known
