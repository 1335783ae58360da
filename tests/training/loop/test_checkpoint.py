"""Which state a run goes on from when its last checkpoint is damaged, or leads to numbers that are none."""

import os
import zipfile

import pytest
import torch

import wuerstchen_core as w
from tests.training.runs import PLAN, Toy, logged, run_toy, toy_batches
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.loop.run import train

STEPS = 12  # two checkpoints, of steps 6 and 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_toy(folder, steps=STEPS)
    return {name: (folder / name).read_bytes() for name in ("checkpoint.pt", "checkpoint-before.pt")}


@pytest.fixture
def folder(trained, tmp_path):
    for name, content in trained.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def load(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


def changed(folder, change, names=("checkpoint.pt",)):
    for name in names:
        state = load(folder, name)
        change(state)
        torch.save(state, folder / name)


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def first_tensor(path):
    """Where the first tensor's bytes are in the file."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if "/data/" in info.filename)
        content = archive.read(info)
    return path.read_bytes().index(content)


def drop(key):
    return lambda state: state.pop(key)


def spoil(*path):
    def change(state):
        *parts, last = path
        for part in parts:
            state = state[part]
        state[last] = torch.full_like(state[last], torch.nan)

    return change


def reshape(state):
    state["optimizer"]["network.0.weight"]["exp_avg"] = torch.zeros(3)


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 100),
    "empty": lambda path: path.write_bytes(b""),
    "bit of a tensor": lambda path: flip(path, first_tensor(path)),
    "page of zeros": lambda path: path.write_bytes(path.read_bytes()[:-2000] + bytes(1000) + path.read_bytes()[-1000:]),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "missing": lambda path: path.unlink(),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "compressed": lambda path: zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED).writestr("data.pkl", b"0" * 1000),
}
CHANGES = {
    **{f"without {key}": drop(key) for key in ("task", "step", "weights", "averaged", "optimizer", "scaler", "run")},
    "NaN in the weights": spoil("weights", "network.0.weight"),
    "NaN in the average": spoil("averaged", "network.3.bias"),
    "NaN in the optimizer": spoil("optimizer", "network.0.bias", "exp_avg_sq"),
    "other optimizer": reshape,
    "no moments": lambda state: state["optimizer"]["network.0.weight"].clear(),
    "numbers for tensors": lambda state: state["averaged"].update({"network.0.weight": 3}),
    "a text for the step": lambda state: state.update(step="12"),
}


@pytest.mark.parametrize("how", [*DAMAGES, *CHANGES])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(folder, how, caplog):
    if how in DAMAGES:
        DAMAGES[how](folder / "checkpoint.pt")
    else:
        changed(folder, CHANGES[how])
    run_toy(folder, steps=13)
    (told,) = (record.getMessage() for record in caplog.records)
    assert "checkpoint.pt: no good (" in told and "the checkpoint before it, of step 6" in told
    assert len(told) < 500 and "\n" not in told
    assert sorted(logged(folder)["loss/turned"]) == list(range(7, 14))
    assert load(folder)["step"] == 13 and load(folder, "checkpoint-before.pt")["step"] == 12
    assert os.path.lexists(folder / "checkpoint-bad.pt") == (how != "missing")


@pytest.mark.parametrize("how", ["without optimizer", "other optimizer", "NaN in the average"])
def test_without_a_good_one_before_the_error_says_what_to_do(folder, how):
    changed(folder, CHANGES[how], ("checkpoint.pt", "checkpoint-before.pt"))
    kept = (folder / "checkpoint.pt").read_bytes()
    for _ in range(2):
        with pytest.raises(w.WuerstchenError, match="checkpoint that can be read .*train in another folder") as told:
            run_toy(folder)
        assert len(str(told.value)) < 500 and "\n" not in str(told.value)
        (folder / "checkpoint-before.pt").unlink(missing_ok=True)
    assert (folder / "checkpoint.pt").read_bytes() == kept


@pytest.mark.parametrize("where", ["weights", "exp_avg_sq"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, where):
    """The twelfth step's loss and gradient are good, its update is not."""
    step, count = torch.optim.AdamW.step, 0

    def spoiling(self, *arguments, **options):
        nonlocal count
        count += 1
        step(self, *arguments, **options)
        if count == 12:
            parameter = self.param_groups[0]["params"][0]
            (parameter.data if where == "weights" else self.state[parameter][where])[0, 0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    with pytest.raises(w.WuerstchenError, match=r"step 12 went wrong: .*not finite.*checkpoint.pt, of step 6"):
        run_toy(tmp_path)
    assert load(tmp_path)["step"] == 6 and not (tmp_path / "checkpoint-before.pt").exists()


def test_an_average_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    from wuerstchen_core.training.loop import state

    move = state.move_average

    def moved(averaged, weights, decay):
        move(averaged, weights, decay)
        averaged.network[0].weight.data[0, 0] = torch.inf

    monkeypatch.setattr(state, "move_average", moved)
    with pytest.raises(w.WuerstchenError, match="step 6 went wrong: .*their average.* nothing was saved yet"):
        run_toy(tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_whose_next_step_goes_wrong_gives_way_to_the_one_before(tmp_path):
    """A learning rate that blows the weights up to finite numbers: their loss is none."""
    run_toy(tmp_path, steps=6, save_every=1)
    good = load(tmp_path)
    with pytest.raises(w.WuerstchenError) as told:
        run_toy(tmp_path, save_every=1, learning_rate=1e30)
    assert "step 8 went wrong" in str(told.value) and "checkpoint.pt, of step 6" in str(told.value)
    assert "step 7, which led to this, is now checkpoint-bad.pt" in str(told.value)
    assert load(tmp_path)["step"] == 6
    assert torch.equal(load(tmp_path)["weights"]["network.0.weight"], good["weights"]["network.0.weight"])
    run_toy(tmp_path, steps=12, save_every=1)
    assert load(tmp_path)["step"] == 12

    alone = tmp_path / "alone"
    with pytest.raises(w.WuerstchenError, match="of step 1, led to this, and there is no good one before it"):
        train(Toy(spoil={1: torch.nan}), Plan(**{**PLAN, "save_every": 1}), alone, toy_batches())
    assert load(alone)["step"] == 1


def test_a_learning_rate_beyond_all_floats_is_told(tmp_path):
    for rate in (1e38, 1e300):
        with pytest.raises(w.WuerstchenError, match="went wrong.*Try a lower learning rate") as told:
            run_toy(tmp_path / str(rate), learning_rate=rate, warm_up=0)
        assert len(str(told.value)) < 500
        assert not (tmp_path / str(rate) / "checkpoint.pt").exists()


def test_before_the_first_average_what_is_exported_are_the_weights(tmp_path):
    class Exporting(Toy):
        def export(self, folder, dtype):
            torch.save(self.network.state_dict(), folder / "exported.pt")
            return [folder / "exported.pt"]

        def samples(self):
            torch.save(self.network.state_dict(), tmp_path / "drawn.pt")

    def exported(folder=tmp_path, name="exported.pt"):
        return {f"network.{key}": value for key, value in torch.load(folder / name).items()}

    plan = {**PLAN, "ema_every": 5, "save_every": 3, "sample_every": 4}
    train(Exporting(), Plan(**{**plan, "steps": 4}), tmp_path, toy_batches())
    for name in ("exported.pt", "drawn.pt"):
        assert all(torch.equal(value, load(tmp_path)["weights"][key]) for key, value in exported(name=name).items())
    (tmp_path / "exported.pt").unlink()
    train(Exporting(), Plan(**{**plan, "steps": 4}), tmp_path, toy_batches())  # is done, and exports again
    assert all(torch.equal(value, load(tmp_path)["weights"][key]) for key, value in exported().items())
    train(Exporting(), Plan(**{**plan, "steps": 9}), tmp_path, toy_batches())
    train(Exporting(), Plan(**{**plan, "steps": 9}), tmp_path / "whole", toy_batches())
    for folder in (tmp_path, tmp_path / "whole"):
        averaged = load(folder)["averaged"]
        assert all(torch.equal(value, averaged[key]) for key, value in exported(folder).items())
        assert not torch.equal(averaged["network.0.weight"], load(folder)["weights"]["network.0.weight"])
    ours, theirs = load(tmp_path)["averaged"], load(tmp_path / "whole")["averaged"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_as_many_checkpoints_are_kept_as_the_plan_says(tmp_path):
    run_toy(tmp_path, steps=40, save_every=5, keep_checkpoints=4)
    numbered = sorted(path.name for path in tmp_path.glob("checkpoint-0*.pt"))
    assert numbered == ["checkpoint-0000025.pt", "checkpoint-0000030.pt"]
    assert [load(tmp_path, name)["step"] for name in numbered] == [25, 30]
    assert load(tmp_path)["step"] == 40 and load(tmp_path, "checkpoint-before.pt")["step"] == 35
    os.replace(tmp_path / numbered[0], tmp_path / "checkpoint.pt")
    run_toy(tmp_path, steps=30, save_every=5, keep_checkpoints=4)
    assert load(tmp_path)["step"] == 30
    whole = tmp_path / "whole"
    run_toy(whole, steps=30, save_every=5)
    assert torch.equal(load(tmp_path)["weights"]["network.0.weight"], load(whole)["weights"]["network.0.weight"])
    assert not list(whole.glob("checkpoint-0*.pt"))
