"""The training engine: its arithmetic, and that a run survives what may happen to it."""

import dataclasses
import math
import os
import signal

import pytest
import torch
from torch import nn

import wuerstchen_core as w
from tests.training.runs import (
    PLAN,
    Toy,
    fill_disk,
    free_port,
    hang_in_a_step,
    hang_while_saving,
    logged,
    process,
    run_sharded,
    run_toy,
    toy_batches,
    wait_for,
)
from wuerstchen_core.training.loop import learner, run
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.loop.run import train
from wuerstchen_core.training.loop.state import averaging_copy, move_average

PLAN = Plan(**PLAN)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run_toy(folder)
    return folder


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(ours, theirs):
    """Bit for bit, all the way down."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def assert_as_never_stopped(folder, whole):
    """Every loss that was ever logged, before or after a stop, is that of the whole run; and so is all that is kept."""
    ours, theirs = logged(folder), logged(whole)
    assert ours.keys() == theirs.keys() == {"loss/turned", "loss/common", "gradient_norm", "learning_rate"}
    for tag, steps in theirs.items():
        assert sorted(ours[tag]) == sorted(steps) == list(range(1, PLAN.steps + 1))
        assert all(set(ours[tag][step]) == set(values) for step, values in steps.items())
    assert_same(checkpoint(folder), checkpoint(whole))
    assert not list(folder.glob(".*"))


def test_a_run_killed_at_any_moment_resumes_as_if_it_had_not_been(tmp_path, whole):
    saving = process(hang_while_saving, tmp_path, 3)
    wait_for((tmp_path / "hangs").exists)
    saving.kill()
    saving.join()
    (tmp_path / "hangs").unlink()
    assert checkpoint(tmp_path)["step"] == 12 and list(tmp_path.glob(".checkpoint.pt.*.partial"))
    before = (tmp_path / "checkpoint.pt").stat().st_ino
    training = process(run_toy, tmp_path, 0.05)
    wait_for(lambda: (tmp_path / "checkpoint.pt").stat().st_ino != before)
    training.kill()
    training.join()
    assert training.exitcode == -signal.SIGKILL
    run_toy(tmp_path)
    assert_as_never_stopped(tmp_path, whole)


def test_ctrl_c_saves_and_says_how_to_go_on_and_a_second_one_ends_at_once(tmp_path, whole, capfd):
    class Interrupted(Toy):
        def forward(self, batch, draws):
            if draws.step == 8:
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(batch, draws)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 9, which .*checkpoint.pt has: the same command"):
        train(Interrupted(), PLAN, tmp_path, toy_batches())
    assert signal.getsignal(signal.SIGINT) is before
    assert "once more to end at once" in capfd.readouterr().err
    state = checkpoint(tmp_path)
    assert state["step"] == 9
    torch.save({**state, "task": "Toy"}, tmp_path / "checkpoint.pt")
    run_toy(tmp_path)
    assert_as_never_stopped(tmp_path, whole)

    hanging = process(hang_in_a_step, tmp_path / "hanging")
    wait_for((tmp_path / "hanging" / "hangs").exists)
    for _ in range(20):
        os.kill(hanging.pid, signal.SIGINT)
        hanging.join(timeout=0.5)
        if hanging.exitcode is not None:
            break
    assert hanging.exitcode == -signal.SIGINT


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    full = process(fill_disk, tmp_path)
    full.join(timeout=60)
    told = (tmp_path / "told").read_text()
    assert told.startswith("WuerstchenError") and "could not be written" in told
    assert "the checkpoint of step 6 is intact" in told and "the same command goes on" in told
    assert "checkpoint.pt: could not be written (File too large)" in told  # the limit that stands in for a full disk
    assert checkpoint(tmp_path)["step"] == 6
    assert not list(tmp_path.glob(".*"))


def test_weights_that_cannot_be_written_are_told_of(tmp_path, monkeypatch):
    class Exporting(Toy):
        def export(self, folder, dtype):
            if checkpoint(tmp_path)["step"] > 6:
                raise OSError(28, "No space left on device", str(folder / "stage.safetensors"))
            return []

    with pytest.raises(w.WuerstchenError, match=r"stage.safetensors: could not be written \(No space left on device\)"):
        train(Exporting(), PLAN, tmp_path, toy_batches())
    assert checkpoint(tmp_path)["step"] == 12


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_with_what_was_saved(tmp_path, value):
    with pytest.raises(w.WuerstchenError) as told:
        train(Toy(spoil={8: value}), PLAN, tmp_path, toy_batches())
    for part in (
        "step 9 went wrong",
        "turned nan" if value != value else "turned inf",
        "lower learning rate than 0.01",
    ):
        assert part in str(told.value)
    assert "checkpoint.pt, of step 6" in str(told.value)
    state = checkpoint(tmp_path)
    assert state["step"] == 6 and all(tensor.isfinite().all() for tensor in state["weights"].values())


def test_a_gradient_that_overflows_float16_is_skipped_and_not_the_end(tmp_path, monkeypatch):
    """On the CPU accelerate has no scaler for float16: the run gets torch's own, at first with too large a scale."""
    made = run.accelerator_for
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    steep = dict.fromkeys(range(40), 1e4)

    def scaling(plan, task):
        accelerator = made(plan, task)
        accelerator.scaler = scaler
        accelerator.unscale_gradients = lambda: scaler.unscale_(accelerator._optimizers[0].optimizer)
        return accelerator

    monkeypatch.setattr(run, "accelerator_for", scaling)
    train(Toy(spoil=steep), PLAN, tmp_path / "scaled", toy_batches())
    norms = logged(tmp_path / "scaled")["gradient_norm"]
    assert not math.isfinite(norms[1][0]) and math.isfinite(norms[PLAN.steps][0])
    state = checkpoint(tmp_path / "scaled")
    assert state["scaler"]["scale"] == scaler.get_scale() < 2.0**126
    updates = {values["step"].item() for values in state["optimizer"].values()}
    assert updates == {sum(math.isfinite(norm) for (norm,) in norms.values())}

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    monkeypatch.setattr(learner, "OVERFLOWS", 2)
    with pytest.raises(w.WuerstchenError, match="step 2 went wrong: .*gradient norm (inf|nan)"):
        train(Toy(spoil=steep), PLAN, tmp_path / "hopeless", toy_batches())


def test_data_that_give_out_end_the_run_with_all_that_was_learned(tmp_path):
    def batches(seen, rank, world):
        yield from toy_batches(end=8)(seen, rank, world)
        raise w.WuerstchenError("not one sample can be read")

    with pytest.raises(w.WuerstchenError, match="not one sample"):
        train(Toy(), PLAN, tmp_path, batches)
    assert checkpoint(tmp_path)["step"] == 8


def test_a_checkpoint_of_something_else_is_refused(tmp_path, whole):
    (tmp_path / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())

    class Other(Toy):
        pass

    with pytest.raises(w.WuerstchenError, match="the checkpoint of a Toy, not of a Other"):
        train(Other(), PLAN, tmp_path, toy_batches())
    with pytest.raises(w.WuerstchenError, match=r"network.1.weight is \[8\] there and \[4, 8\] here"):
        train(Toy(plain=True), PLAN, tmp_path, toy_batches())
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(w.WuerstchenError, match="not a checkpoint that can be read"):
        run_toy(tmp_path)


def test_a_plan_that_is_done_says_so_and_a_longer_one_goes_on(tmp_path, capsys):
    run_toy(tmp_path, steps=6)
    run_toy(tmp_path, steps=6)
    assert "all of its 6 steps are done" in capsys.readouterr().out
    run_toy(tmp_path, steps=8)
    assert checkpoint(tmp_path)["step"] == 8


def test_the_learning_rate_rises_stays_and_falls():
    plan = Plan(steps=100, learning_rate=0.5, warm_up=10, cool_down=0.2)
    assert [plan.rate(step) for step in (0, 4, 9, 10, 79, 80)] == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.5, 0.5])
    assert [plan.rate(step) for step in (90, 99)] == pytest.approx([0.25, 0.025])
    assert Plan(steps=3, warm_up=0).rate(0) == Plan(steps=3, warm_up=0).rate(2) == 1e-4


def test_adamw_and_the_average_follow_their_formulas(tmp_path):
    """One weight, in float64: decoupled decay, bias-corrected moments, a shortened gradient, then the average."""

    class One(Toy):
        def __init__(self):
            super().__init__(plain=True)
            self.network = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.network.weight, 2.0)

        def forward(self, batch, draws):
            return {"square": 3 * self.network.weight.square().sum()}

    plan = Plan(
        steps=12, learning_rate=0.1, warm_up=4, weight_decay=0.2, gradient_norm=5.0, ema_every=3, ema_decay=0.2,
        log_every=1, save_every=12,
    )  # fmt: skip
    train(One(), plan, tmp_path, toy_batches())
    weight = average = 2.0
    m = v = 0.0
    norms = []
    for step in range(12):
        gradient = 6 * weight
        norms.append(abs(gradient))
        gradient *= min(1.0, 5.0 / (abs(gradient) + 1e-6))
        rate = 0.1 * min(1.0, (step + 1) / 4)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        weight = weight * (1 - rate * 0.2) - rate * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
        if (step + 1) % 3 == 0:
            n = (step + 1) // 3
            decay = min(0.2, n / (10 + n))
            average = decay * average + (1 - decay) * weight
    state = checkpoint(tmp_path)
    assert state["weights"]["network.weight"].item() == pytest.approx(weight, rel=1e-4)
    assert state["averaged"]["network.weight"].item() == pytest.approx(average, rel=1e-4)
    seen = logged(tmp_path)
    assert [seen["gradient_norm"][step + 1][0] for step in range(12)] == pytest.approx(norms, rel=1e-4)
    assert seen["learning_rate"][2] == pytest.approx([0.05])


def test_the_average_shares_what_is_not_learned():
    task = Toy()
    task.network[0].bias.requires_grad_(False)
    task.frozen = (nn.Linear(1, 1),)
    copied = averaging_copy(task)
    assert copied.frozen[0] is task.frozen[0] and copied.network[0].bias is task.network[0].bias
    assert not copied.training and "network.0.bias" not in copied.learned()
    before = task.network[0].weight.clone()
    weights = {name: tensor + 1 for name, tensor in task.learned().items()}
    move_average(copied, weights, 0.75)
    torch.testing.assert_close(copied.network[0].weight, before + 0.25)
    assert copied.network[1].num_batches_tracked == 1 and torch.equal(task.network[0].weight, before)


def test_accumulated_batches_are_one_that_is_larger(tmp_path):
    train(Toy(plain=True), dataclasses.replace(PLAN, steps=12), tmp_path / "large", toy_batches(4))
    accumulating = dataclasses.replace(PLAN, steps=12, accumulate=2)

    class Common(Toy):
        """`Draws.common` is each batch's own: left out."""

        def forward(self, batch, draws):
            return {"turned": super().forward(batch, draws)["turned"]}

    train(Common(plain=True), accumulating, tmp_path / "small", toy_batches(2))
    train(Common(plain=True), dataclasses.replace(PLAN, steps=12), tmp_path / "one", toy_batches(4))
    small, one, large = (logged(tmp_path / name)["loss/turned"] for name in ("small", "one", "large"))
    assert [small[step][0] for step in range(1, 13)] == pytest.approx([one[step][0] for step in range(1, 13)], rel=1e-5)
    assert one[12] != large[12]


def test_two_processes_that_share_the_weights_learn_as_one(tmp_path):
    """FSDP: the losses of one process with the doubled batch, resumed by two and then by one."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(Toy(plain=True), dataclasses.replace(PLAN, steps=16), one, toy_batches(4))
    for steps in (9, 12):
        port = free_port()
        ranks = [process(run_sharded, two, rank, port, steps) for rank in range(2)]
        for rank in ranks:
            rank.join(timeout=120)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    train(Toy(plain=True), dataclasses.replace(PLAN, steps=16), two, toy_batches(4))
    for tag, steps in logged(one).items():
        assert [logged(two)[tag][step][-1] for step in steps] == pytest.approx([x for (x,) in steps.values()], rel=1e-5)
    ours, theirs = checkpoint(two), checkpoint(one)
    for kept in ("weights", "averaged"):
        for name, tensor in theirs[kept].items():
            torch.testing.assert_close(ours[kept][name], tensor)
