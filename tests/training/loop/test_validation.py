"""The loss on pictures that are held out, and the speed that is logged."""

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tests.training.runs import PLAN, Toy, logged, toy_batches
from wuerstchen_core.training.loop.draws import Draws
from wuerstchen_core.training.loop.plan import Plan
from wuerstchen_core.training.loop.run import train


def held_out():
    for number in range(3):
        yield {"image": torch.full((1, 4), 0.1 * number), "key": ["held"]}


def test_the_validation_loss_is_that_of_the_averaged_weights_with_the_same_noise(tmp_path):
    train(Toy(), Plan(**{**PLAN, "steps": 12}), tmp_path / "seen", toy_batches(), held_out=held_out)
    seen = logged(tmp_path / "seen")
    assert sorted(seen["validation/turned"]) == [6, 12]
    network = Toy()
    state = torch.load(tmp_path / "seen" / "checkpoint.pt", weights_only=True)
    network.load_state_dict(state["averaged"])
    network.eval()
    losses = []
    for number, batch in enumerate(held_out()):
        draws = Draws("validation", 0, 1, micro=number)
        x = batch["image"] + 0.1 * draws.normal((4,)) + draws.uniform(1)
        losses.append(F.mse_loss(network.network(x), batch["image"].flip(1)).item())
    assert seen["validation/turned"][12] == pytest.approx([sum(losses) / 3], rel=1e-5)

    train(Toy(), Plan(**{**PLAN, "steps": 12}), tmp_path / "blind", toy_batches())
    blind = torch.load(tmp_path / "blind" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(value, state["weights"][name]) for name, value in blind["weights"].items())


def test_speed_and_memory_are_logged(tmp_path, capfd):
    pause = 0.02
    train(Toy(pause=pause), Plan(**{**PLAN, "steps": 12, "log_every": 4}), tmp_path, toy_batches(batch=5))
    found = {}
    for path in (tmp_path / "logs").iterdir():
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.tensor.float_val[0]
    assert all(0 < speed < 1 / pause for speed in found["speed/steps_per_second"].values())
    for step, speed in found["speed/pictures_per_second"].items():
        assert speed == pytest.approx(5 * found["speed/steps_per_second"][step])
    assert sorted(found["speed/memory_gib"]) == [4, 8, 12] and 0.05 < found["speed/memory_gib"][4] < 64
    assert "pictures/s" in capfd.readouterr().err
