"""Small tasks of Stages B and C, and their runs by the command line."""

from wuerstchen_core import cli
from wuerstchen_core.checkpoints.sets import SET
from wuerstchen_core.training.data.options import DataOptions
from wuerstchen_core.training.stages import stage_b, stage_c


def train(stage, *arguments):
    assert cli.main(["train", f"stage-{stage}", "--config", f"{stage}.toml", *arguments]) == 0


ROLES = [(role, role) for role in ("semantic_compressor", "stage_a", "stage_b")]
DATA = DataOptions(data="pictures", size=64)


def task_c(tiny_folder, **options):
    names = {name: str(tiny_folder / SET[role]) for name, role in (("text_encoder", "text_encoder_c"), *ROLES)}
    return stage_c.build(stage_c.Options(**{**names, "init": str(tiny_folder / SET["stage_c"]), **options}), DATA)


def task_b(tiny_folder, **options):
    names = {name: str(tiny_folder / SET[role]) for name, role in (("text_encoder", "text_encoder_c"), *ROLES)}
    del names["stage_b"]
    return stage_b.build(stage_b.Options(**{**names, "init": str(tiny_folder / SET["stage_b"]), **options}), DATA)
