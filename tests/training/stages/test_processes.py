"""Two processes see what one does with the doubled batch, in each stage that claims it."""

import os

import pytest
import torch

import wuerstchen_core as w
from tests.training.runs import free_port, logged, process, run_stages
from wuerstchen_core.checkpoints.sets import SET


def runs(tiny_folder, folder, batch):
    """Stage -> the options of a run of one step, without dropout, whose draws are each process's own."""
    names = {role: str(tiny_folder / name) for role, name in SET.items()}
    readers = {"text_encoder": names["text_encoder_c"], "semantic_compressor": names["semantic_compressor"]}
    common = {"data": "pictures", "size": 64, "batch": batch, "workers": 0, "steps": 1, "warm_up": 0, "log_every": 1}
    stages = {
        "stage-c": {**readers, "network": {"width": 32, "depth": 1, "heads": 2, "text_width": 32, "dropout": 0.0}},
        "stage-b": {**readers, "stage_a": names["stage_a"], "init": names["stage_b"], "text_absent": 0.5},
        "lora": {**readers, "init": names["stage_c"], "rank": 2},
        "distill": {**readers, "init": names["stage_c"], "rank": 2},
        "previewer": {"semantic_compressor": names["semantic_compressor"], "network": {"widths": [8, 8, 8, 8]}},
    }
    return {
        stage: {**common, **options, "folder": f"{folder}/{stage}", "sample_every": 0}
        for stage, options in stages.items()
    }


def test_two_processes_and_one_agree_in_the_first_loss(place, tiny_folder):
    port = free_port()
    ranks = [process(run_stages, rank, port, runs(tiny_folder, place / "two", 2)) for rank in range(2)]
    for stage, options in runs(tiny_folder, place / "one", 4).items():
        w.train(stage, **options)
    for rank in ranks:
        rank.join(timeout=300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    for stage in runs(tiny_folder, "", 1):
        one, two = logged(place / "one" / stage), logged(place / "two" / stage)
        assert one.keys() == two.keys() and any(tag.startswith("loss/") for tag in one)
        for tag, steps in one.items():
            assert two[tag][1] == pytest.approx(steps[1], rel=1e-5), (stage, tag)
        assert os.path.getsize(place / "two" / stage / "checkpoint.pt") > 1000


def test_two_processes_that_share_the_blocks_weights_have_the_gradients_of_one(place, tiny_folder):
    """FSDP2, block by block: AttnBlocks and Stage B's ResBlocks are also called outside of their forward passes."""

    def both(folder, batch):
        common = {"steps": 2, "learning_rate": 1e-5, "gradient_checkpointing": True}
        stages = runs(tiny_folder, folder, batch)
        stages["stage-c"]["init"] = str(tiny_folder / SET["stage_c"])
        return {stage: {**stages[stage], **common} for stage in ("stage-c", "stage-b")}

    port = free_port()
    ranks = [process(run_stages, rank, port, both(place / "two", 2), True) for rank in range(2)]
    for stage, options in both(place / "one", 4).items():
        w.train(stage, **options)
    for rank in ranks:
        rank.join(timeout=300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    for stage in both("", 1):
        one, two = (
            torch.load(place / folder / stage / "checkpoint.pt", weights_only=True)["optimizer"]
            for folder in ("one", "two")
        )
        assert one.keys() == two.keys()
        largest = max(kept["exp_avg"].abs().max() for kept in one.values())
        for name, kept in one.items():
            error = (two[name]["exp_avg"] - kept["exp_avg"]).abs().max()
            assert error < 1e-3 * kept["exp_avg"].abs().max() + 1e-6 * largest, (stage, name)
