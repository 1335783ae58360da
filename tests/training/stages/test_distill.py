"""Distillation: what the student learns from, what it keeps in memory, its files, and its resumption."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import wuerstchen_core as w
from tests.loras import same_bits
from tests.reference import signal
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.cli import main
from wuerstchen_core.mini.source import emoji_source
from wuerstchen_core.training.command import CONFIGS, RunOptions
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.data.sources import register
from wuerstchen_core.training.loop.draws import Draws
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.options import load, read_all
from wuerstchen_core.training.stages import distill

NETWORKS = {"stage-c": "stage_c", "stage-b": "stage_b"}
OTHERS = {"stage_c": "stage_b", "stage_b": "stage_c"}


def files(tiny_folder, network="stage-c"):
    roles = {"text_encoder": "text_encoder_c", **{role: role for role in ("semantic_compressor", "stage_a", "stage_b")}}
    names = {name: str(tiny_folder / SET[role]) for name, role in roles.items()}
    return names | {"init": str(tiny_folder / SET[NETWORKS.get(network, network)]), "network": network}


@pytest.fixture
def build(tiny_folder, emoji):
    def build(network="stage-c", **options):
        register(emoji_source)
        data = DataOptions(data=str(emoji), size=64, batch=2, workers=0)
        torch.manual_seed(0)
        task = distill.build(distill.Options(**{**files(tiny_folder, network), "rank": 3, **options}), data)
        batch = next(data.open(0))
        batch["image"] = batch["image"].float() / 255
        return task, batch | {"features": task.features(batch)}

    return build


@pytest.fixture
def teach(tiny_folder, emoji, tmp_path, monkeypatch):
    """teach(folder, **options): distills on three emoji in two styles, and gives what wuerstchen train returns."""
    monkeypatch.chdir(tmp_path)
    few = {"data": emoji, "size": 64, "batch": 2, "workers": 0, "warm_up": 0, "cool_down": 0, "learning_rate": 0.01,
           "steps": 4, "save_every": 2, "ema_every": 1, "sample_every": 0, "rank": 3}  # fmt: skip

    def teach(folder, network="stage-c", **options):
        options = files(tiny_folder, network) | few | {"folder": folder} | options
        given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return main(["train", "distill", "--config", "mini", *given])

    return teach


def checkpoint(folder):
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


def spread(values):
    return torch.tensor([float(value) for value in values])[:, None, None, None]


@pytest.mark.parametrize("cfg", [1.0, 3.5])
def test_stage_c_learns_the_guided_teachers_step_seen_by_its_own_average(build, cfg):
    """The loss of one batch, written out; the student and its average have moved apart."""
    task, batch = build(cfg_c=cfg, intervals=10, p2_k=0.2)
    teacher, target = task.networks
    student = task.base.network
    for network in (student, target):
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    task.target_step = 7  # the average has moved in this step already
    loss = task(batch, Draws(0, 7, 2))["consistency"]

    draws = Draws(0, 7, 2)
    t = ((1 - draws.uniform(1)) * 1.08 + 0.001).clamp(0.001, 1).flatten()
    s = (t - 0.1).clamp(min=0)
    at_t, at_s = spread(map(signal, t.tolist())), spread(map(signal, s.tolist()))
    latent, text = batch["features"]["semantic"], batch["features"]["text"]
    x = at_t.sqrt() * latent + (1 - at_t).sqrt() * draws.normal((1, *latent.shape[1:]))[:, 0]
    nothing = task.base.frozen[0].encode_tokens(task.base.frozen[0].tokenize([""])[0][:, 0])
    with torch.no_grad():
        unguided = teacher(x, t, nothing.expand(2, -1, -1))
        noise = unguided + cfg * (teacher(x, t, text) - unguided)
        further = at_s.sqrt() * (x - (1 - at_t).sqrt() * noise) / at_t.sqrt() + (1 - at_s).sqrt() * noise
        goal = (further - (1 - at_s).sqrt() * target(further, s, text)) / at_s.sqrt()
        goal = torch.where(spread(s) == 0, further, goal)
        found = (x - (1 - at_t).sqrt() * student(x, t, text)) / at_t.sqrt()
    ratio = at_t / (1 - at_t)
    lengths = ((found - goal) * (ratio / (0.2 + ratio)).sqrt()).flatten(1).norm(dim=1)
    c = 0.00054 * math.sqrt(latent[0].numel())
    assert loss.item() == pytest.approx(((lengths.square() + c**2).sqrt() - c).mean().item(), rel=1e-3)
    assert loss.item() > 0.01


@pytest.mark.parametrize("network", NETWORKS)
def test_a_student_that_shares_all_but_its_lora_begins_as_its_teacher(build, network):
    task, batch = build(network)
    teacher, target = task.networks
    kept = {one.data_ptr() for one in teacher.parameters()}
    learned = {name: one for name, one in task.base.network.named_parameters() if one.requires_grad}
    assert learned and all("lora_" in name for name in learned)
    for other in (task.base.network, target):
        own = [one for one in other.parameters() if one.data_ptr() not in kept]
        assert sum(one.numel() for one in own) == sum(one.numel() for one in learned.values())
    loss = task(batch, Draws(0, 0, 2))["consistency"]
    loss.backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in learned.values())
    assert all(one.grad is None for network in (teacher, target) for one in network.parameters())
    task.train()
    assert not any(module.training for module in task.modules())  # dropout would be noise in what is to agree


def test_with_rank_0_the_whole_network_learns_from_a_teacher_of_its_own(build):
    task, _ = build(rank=0)
    teacher, target = task.networks
    parameters = list(task.base.network.parameters())
    assert all(one.requires_grad for one in parameters)
    pointers = [{one.data_ptr() for one in network.parameters()} for network in (task.base.network, teacher, target)]
    assert len(set.union(*pointers)) == 3 * len(parameters)
    assert same_bits(teacher, task.base.network.state_dict())


def test_the_average_that_is_learned_from_moves_once_a_step(build):
    task, batch = build(target_decay=0.75)
    name = "blocks.2.attention.to_q.lora_B.default.weight"
    student = task.base.network.get_parameter(name)
    expected = student.detach().clone()
    for step in range(3):
        student.data.add_(step + 1.0)
        expected = 0.75 * expected + 0.25 * student.detach()
        for _ in range(2):  # micro-batches of one step
            task(batch, Draws(0, step, 2))
        torch.testing.assert_close(task.networks.target.get_parameter(name), expected)
    alone, _ = build(target_decay=0)
    assert alone.networks.target is None and not any(name.startswith("target.") for name in alone.learned())


@pytest.mark.parametrize("network, rank", [("stage-c", 3), ("stage-c", 0), ("stage-b", 3)])
def test_a_distillation_goes_on_as_if_never_stopped(teach, network, rank):
    options = {"network": network, "rank": rank, "text_absent": 0.5}
    assert teach("whole", **options) == 0
    assert teach("parts", steps=2, **options) == 0
    assert teach("parts", **options) == 0
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert any(name.startswith("target.") for name in whole["weights"])
    for kind in ("weights", "averaged"):
        assert whole[kind].keys() == parts[kind].keys()
        assert all(whole[kind][name].equal(parts[kind][name]) for name in whole[kind])
    (name,) = [path.name for path in Path("whole").glob("stage_*.safetensors")]
    ours, theirs = load_file(f"whole/{name}"), load_file(f"parts/{name}")
    assert all(ours[tensor].equal(theirs[tensor]) for tensor in ours)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_lora_that_is_written_is_the_averaged_student(teach, tiny_folder, network):
    role = NETWORKS[network]
    assert teach("run", network=network, sample_steps=3, dtype="float16") == 0
    lora = w.load_lora(f"run/{role}_lora.safetensors")
    assert lora.stage == {"stage_c": "Stage C", "stage_b": "Stage B"}[role]
    assert lora.sampling == {"steps": 3, "cfg": 1.0, "sampler": "lcm"}
    averaged = checkpoint("run")["averaged"]
    network = getattr(w, f"load_{role}")(tiny_folder / SET[role])
    lora.check(network)
    for name, change in lora.changes.items():
        down, up = (averaged[f"base.network.{name}.lora_{half}.default.weight"].flatten(1) for half in "AB")
        torch.testing.assert_close(change.delta("cpu"), up @ down, rtol=5e-3, atol=1e-4)
    linear = {name for name, one in network.named_modules() if isinstance(one, torch.nn.Linear)}
    assert linear <= lora.changes.keys()
    with pytest.raises(w.WuerstchenError, match=f"a LoRA for {lora.stage}, and this is Stage"):
        lora.check(getattr(w, f"load_{OTHERS[role]}")(tiny_folder / SET[OTHERS[role]]))


def test_a_whole_network_is_written_for_the_loaders(teach, tiny_folder):
    assert teach("run", rank=0) == 0
    network = w.load_stage_c("run/stage_c.safetensors")
    averaged = checkpoint("run")["averaged"]
    assert same_bits(network, {name: averaged[f"base.network.{name}"] for name in network.state_dict()})
    assert not same_bits(w.load_stage_c(tiny_folder / SET["stage_c"]), network.state_dict())


@pytest.mark.parametrize("network, size", [("stage-c", (2 * 64 + 12, 64 + 8)), ("stage-b", (2 * 64 + 12, 64 + 8))])
def test_samples_are_drawn_in_few_steps(teach, network, size, monkeypatch):
    from wuerstchen_core.diffusion import samplers

    steps, sample_lcm = [], samplers.SAMPLERS["lcm"]

    def counted(model, x, times, *more):
        steps.append(len(times) - 1)
        return sample_lcm(model, x, times, *more)

    monkeypatch.setitem(samplers.SAMPLERS, "lcm", counted)
    options = {"steps": 1, "sample_every": 1, "sample_steps": 2, "sample_count": 1, "prompts": json.dumps(["a", "b"])}
    assert teach("run", network=network, **options) == 0
    assert Image.open("run/samples/0000001.png").size == size
    assert steps[0] == 2


@pytest.mark.parametrize(
    "options, says",
    [
        ({"network": "stage_a"}, "unknown network .stage_a."),
        ({"init": ""}, "init is missing"),
        ({"init": "none.safetensors"}, "init: there is no none.safetensors"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 0, "targets": '["to_q"]'}, "targets are of a LoRA"),
        ({"targets": '["to_x"]'}, "to_x: there is no such module"),
        ({"intervals": 0}, "intervals is 0"),
        ({"target_decay": 1.5}, "target_decay is 1.5"),
        ({"cfg_c": "nan"}, "cfg_c is nan"),
        ({"noise_levels": 0}, "noise_levels"),
    ],
)
def test_what_cannot_be_distilled_is_named(teach, tmp_path, options, says, capsys):
    assert teach("run", **options) == 2
    assert re.search(says, capsys.readouterr().err.splitlines()[-1]) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["mini", "v2"])
def test_the_shipped_configurations_are_whole(size):
    path = str(CONFIGS / size / "distill.toml")
    table = load(path)
    *_, options = read_all((RunOptions, DataOptions, Plan, distill.Options), table, path)
    assert options.network == "stage-c" and options.init == table.get("init", "mini") and options.rank
