"""The optimizer: what decays, its two kinds, and that a step waits for nothing."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import wuerstchen_core as w
from tests.training.runs import PLAN, Toy, logged, toy_batches
from wuerstchen_core.models.stage_c import Prior, StageCConfig
from wuerstchen_core.training.loop import learner, optimizer
from wuerstchen_core.training.loop.optimizer import optimizer_for
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.loop.run import train


def groups(network, **options):
    task = Toy(plain=True)
    task.network = network
    names, made = optimizer_for(task, Plan(**{**PLAN, **options}), torch.device("cpu"))
    parameters = dict(task.named_parameters())
    assert [parameters[name] for name in names] == [one for group in made.param_groups for one in group["params"]]
    assert set(names) == set(parameters)
    decays = [group["weight_decay"] for group in made.param_groups for _ in group["params"]]
    assert {group["betas"] for group in made.param_groups} == {(0.8, 0.95)}
    return dict(zip(names, decays, strict=True))


def test_weights_decay_and_biases_and_gains_do_not_unless_they_are_told_to():
    network = Prior(StageCConfig(width=32, depth=1, heads=2, text_width=16))
    decays = groups(network, weight_decay=0.3, beta1=0.8, beta2=0.95)
    for name, decay in decays.items():
        assert decay == (0.3 if name.endswith("weight") else 0.0), name  # GRN's are gamma and beta
    assert any(name.endswith("channelwise.2.gamma") for name in decays)
    together = groups(network, weight_decay=0.3, decay_all=True, beta1=0.8, beta2=0.95)
    assert set(together.values()) == {0.3}


class Waits(TorchDispatchMode):
    """Notes what makes the CPU wait for a device: a number read from a tensor, indices or sizes that depend on one."""

    KINDS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if any(name.startswith(kind) for kind in self.KINDS):
            self.seen.append(name)
        return function(*arguments, **(options or {}))


def test_between_two_log_entries_nothing_waits_for_the_device(tmp_path):
    with Waits() as waits:
        assert torch.ones(1).item() == 1 and waits.seen == ["_local_scalar_dense"]  # it is noted

    plan = Plan(**{**PLAN, "steps": 12, "log_every": 6, "save_every": 12, "ema_every": 2})
    seen = []
    step, results = learner.Learner.step, learner.Learner.results

    def watched(self, *arguments):
        with Waits() as waits:
            step(self, *arguments)
        seen.append(waits.seen)

    fetched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner.Learner, "step", watched)
        patch.setattr(learner.Learner, "results", lambda self: fetched.append(len(self.waiting)) or results(self))
        train(Toy(), plan, tmp_path, toy_batches())
    assert seen == [[]] * 12 and fetched == [6, 6]
    assert sorted(logged(tmp_path)["loss/turned"]) == [6, 12]


def test_a_step_that_goes_wrong_between_two_log_entries_is_named(tmp_path):
    plan = Plan(**{**PLAN, "log_every": 10, "save_every": 6})
    with pytest.raises(w.WuerstchenError, match="step 9 went wrong: .*turned nan.*checkpoint.pt, of step 6"):
        train(Toy(spoil={8: torch.nan}), plan, tmp_path, toy_batches())


class EightBits(torch.optim.AdamW):
    """AdamW with bitsandbytes' names for its state."""

    def step(self, closure=None):
        for values in self.state.values():
            values["exp_avg"], values["exp_avg_sq"] = values.pop("state1"), values.pop("state2")
        super().step(closure)
        for values in self.state.values():
            values["state1"], values["state2"] = values.pop("exp_avg"), values.pop("exp_avg_sq")


def test_the_optimizer_of_eight_bits_is_resumed_and_not_taken_for_the_other(tmp_path, monkeypatch):
    with pytest.raises(w.WuerstchenError, match="adamw8bit needs a GPU"):
        train(Toy(), Plan(**{**PLAN, "optimizer": "adamw8bit"}), tmp_path / "cpu", toy_batches())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(w.WuerstchenError, match="can't be imported .*pip install bitsandbytes"):
        optimizer._eight_bits(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=EightBits))
    assert optimizer._eight_bits(torch.device("cuda")) is EightBits
    monkeypatch.setattr(optimizer, "_eight_bits", lambda device: EightBits)
    eight = {**PLAN, "optimizer": "adamw8bit"}
    for steps in (7, 12):
        train(Toy(), Plan(**{**eight, "steps": steps}), tmp_path / "eight", toy_batches())
    train(Toy(), Plan(**{**eight, "steps": 12}), tmp_path / "whole", toy_batches())
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["weights"] for name in ("eight", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(w.WuerstchenError, match="state of the optimizer adamw8bit, not of adamw: go on with"):
        train(Toy(), Plan(**PLAN), tmp_path / "eight", toy_batches())
