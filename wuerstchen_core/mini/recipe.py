"""The mini's recipe: runs of `wuerstchen train STAGE --config mini`, each with the networks of the runs before it.

What stands here is what those configurations can't know: the files of the runs before, in the place of the mini's own.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.command import train
from ..training.data.sources import register
from ..util.atomic import replacing
from ..util.errors import WuerstchenError
from .emoji import EmojiSet
from .source import emoji_source

VARIANTS = 4  # pictures of each emoji whose latents the text encoder learns from


@dataclass(frozen=True)
class Run:
    """A stage's run: the files that it gives the set by the names it has for them, those that its options name, and
    options of its own."""

    stage: str
    gives: Mapping[str, str]
    reads: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    is_cached: bool = False  # whether it learns from the features of VARIANTS pictures of each emoji


COMPRESSOR = {"semantic_compressor": "semantic_compressor"}
RUNS = {
    "stage_a": Run("stage-a", {"stage_a": "stage_a"}),
    "semantic_compressor": Run(
        "previewer",
        {"semantic_compressor": "semantic_compressor", "previewer": "previewer"},
        options={"semantic_compressor": "", "train_compressor": True, "latent_noise": 0.05},
    ),
    "linear_preview": Run(
        "previewer",
        {"previewer": "linear_preview"},
        COMPRESSOR,
        {"network": {"widths": []}, "steps": 600, "learning_rate": 0.02, "warm_up": 20, "cool_down": 0.8},
    ),
    "text_encoder": Run("text-encoder", {"text_encoder": "text_encoder_contrastive"}, COMPRESSOR, is_cached=True),
    "stage_c": Run(
        "stage-c",
        {"stage_c": "stage_c", "text_encoder": "text_encoder"},
        COMPRESSOR | {"text_encoder": "text_encoder_contrastive"},
        {"train_text_encoder": True, "sample_every": 0},
    ),
    "stage_b": Run(
        "stage-b", {"stage_b": "stage_b"}, COMPRESSOR | {"stage_a": "stage_a", "text_encoder": "text_encoder"}
    ),
    "distill": Run(
        "distill",
        {"stage_c_lora": "stage_c_distilled"},
        COMPRESSOR | {name: name for name in ("stage_a", "stage_b", "text_encoder")} | {"init": "stage_c"},
    ),
}


def train_mini(data: str | Path, work: str | Path, only: str | None = None, steps: int | None = None) -> None:
    """Trains the mini's networks on the emoji of `data`; the set comes to `work`, where each run has a folder, too.

    A run whose files are in `work` is not done again; one that was stopped goes on from its checkpoint. `only` names
    one of RUNS, `steps` is in the place of every run's own.

    Raises:
        WuerstchenError: there is no data set in `data`, `only` is not one of the runs, steps is below 1, or what
            `training.command.train` raises.
        KeyboardInterrupt: SIGINT or SIGTERM came; the run was saved.
    """
    if only not in (None, *RUNS):
        raise WuerstchenError(f"the mini has no run {only!r}: choose one of {', '.join(RUNS)}")
    if steps is not None and steps < 1:
        raise WuerstchenError(f"steps is {steps}: it must be at least 1")
    EmojiSet(data)
    register(emoji_source)
    work = Path(work)
    for name in (only,) if only else RUNS:
        run = RUNS[name]
        if not all(_file(work, given).exists() for given in run.gives.values()):
            _train(run, str(data), work, work / "runs" / name, {} if steps is None else {"steps": steps})


def _train(run: Run, data: str, work: Path, folder: Path, given: Mapping[str, Any]) -> None:
    reads = {option: str(_file(work, name)) for option, name in run.reads.items()}
    options = {"dtype": "float16", **run.options, **reads, **given}
    if run.is_cached:
        data, options["cache"] = f"{data}?variants={VARIANTS}", str(work / "features")
    train(run.stage, config="mini", folder=folder, data=data, **options)
    for own, name in run.gives.items():
        with replacing(_file(work, name)) as partial:
            shutil.copyfile(_file(folder, own), partial)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
