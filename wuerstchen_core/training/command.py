"""Training in the public interface and on the command line: a stage's options from all places, and its run."""

import argparse
import dataclasses
import importlib
import os
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..util.atomic import replacing
from ..util.errors import WuerstchenError
from .options import check_utf8, listed, literal, load, merge, option, override, read_all, written

CONFIGS = Path(__file__).parent / "configs"

# Stage -> the module with its `Options` and `build`, and what the help says.
STAGES = {
    "text-encoder": ("text_encoder", "a text encoder from scratch: which caption belongs to which semantic latent"),
    "stage-a": ("stage_a", "Stage A, from pictures to latents and back, with an adversarial loss"),
    "stage-b": ("stage_b", "Stage B, from semantic latents to Stage A's, and the semantic compressor with it"),
    "stage-c": ("stage_c", "Stage C, from text to semantic latents"),
    "previewer": ("previewer", "a previewer, from semantic latents to small pictures"),
    "lora": ("lora", "a LoRA, a small file that changes Stage C"),
    "distill": ("distill", "a Stage C or B that draws in a few steps without guidance, from one that needs many"),
}


@dataclass(frozen=True)
class RunOptions:
    folder: str = option(help="where the run keeps its checkpoint, weights, samples and logs")

    def __post_init__(self):
        if not self.folder.strip():
            raise WuerstchenError("folder is empty: name the folder where the run is to be kept")
        check_utf8("folder", self.folder)  # tensorboard can write nowhere else


def train(
    stage: str,
    *,
    config: str | Path | None = None,
    folder: str | Path | None = None,
    data: str | Path | None = None,
    **options: Any,
) -> None:
    """Trains a stage, from where the last run in its folder has stopped: what `wuerstchen train STAGE` does.

        w.train("stage-c", config="mini", folder="runs/c", data="pictures", steps=1000, network={"depth": 4})

    Args:
        stage: "text-encoder", "stage-a", "stage-b", "stage-c", "previewer", "lora" or "distill".
        config: a TOML file of options, or "mini", "v2", "paper" (then "paper-2", …) or "baseline", which are shipped.
            Without one, all others are the defaults.
        folder: where the run keeps its checkpoints, weights, samples and logs (as in `config`, if not given).
        data: what it learns from: a folder of pictures with captions, or shards (as in `config`, if not given).
        options: all others by their names, which go before `config`'s. They are the fields of `DataOptions`
            (training/data/options.py), of `Plan` (training/loop/plan.py) and of the stage's `Options`
            (training/stages/); `wuerstchen train STAGE --help` lists them with their defaults.

    Raises:
        WuerstchenError: there is no such stage, an option is unknown, missing or out of its range, or what
            `training.loop.run.train` raises.
        KeyboardInterrupt: SIGINT or SIGTERM came; the run was saved, and the message says how to go on.
    """
    places = {name: value for name, value in (("folder", folder), ("data", data)) if value is not None}
    classes, where, table = _options(stage, config, places | options)
    run_options, data_options, plan, own = read_all(classes, table, where)
    _train(_module(stage), run_options, data_options, plan, own)


def configured(stage: str, config: str | Path) -> Any:
    """The stage's own `Options` as a configuration has them. Raises WuerstchenError as `train` does."""
    classes, where, table = _options(stage, config, {})
    return read_all(classes, table, where)[-1]


def run(stage: str, arguments: list[str]) -> None:
    """`train` with what `wuerstchen train STAGE` is given; with --write-config its options are written instead.

    Raises:
        WuerstchenError: as `train` does, or the file can't be written.
    """
    given = _parsed(stage, arguments)
    config, file = given.pop("config", None), given.pop("write_config", None)
    options = override(_classes(stage), {}, given)
    if file is None:
        train(stage, config=config, **options)
        return
    classes, where, table = _options(stage, config, options)
    try:
        text = written(classes, table, where).encode()
        with replacing(file) as partial:
            partial.write_bytes(text)
    except (OSError, UnicodeEncodeError) as error:
        raise WuerstchenError(f"{file}: could not be written ({getattr(error, 'strerror', None) or error})") from error
    print(f"{file}: the options of {stage}")


def _module(stage: str):
    if stage not in STAGES:
        raise WuerstchenError(f"there is no stage {str(stage)[:80]!r}: take one of {', '.join(STAGES)}")
    return importlib.import_module(f".stages.{STAGES[stage][0]}", __package__)


def _classes(stage: str) -> tuple[type, ...]:
    from .data.options import DataOptions
    from .loop.plan import Plan

    return RunOptions, DataOptions, Plan, _module(stage).Options


def _options(stage: str, config: str | Path | None, given: dict[str, Any]) -> tuple[tuple, str, dict[str, Any]]:
    """The classes of a stage's options, where the options are from, and all that are given."""
    from .data.options import check_no_commands

    classes = _classes(stage)
    if config is None:
        return classes, stage, merge({}, given)
    path = _config_file(str(config), STAGES[stage][0])
    table = load(str(path))
    if "data" not in given:
        check_no_commands(table, str(path))
    return classes, str(path), merge(table, given)


def _train(module, run_options: RunOptions, data, plan, options) -> None:
    import torch

    from .data.feature_cache import FeatureCache, fingerprint
    from .loop import record
    from .loop.run import train as learn

    torch.manual_seed(plan.seed)
    task = module.build(options, data)
    cache = None
    if data.cache:
        if not task.feature_files:
            raise WuerstchenError("cache: with these options no network is frozen, so there is nothing to keep")
        key = f"{type(task).__name__} {task.feature_key} {fingerprint(*task.feature_files)}"
        cache = FeatureCache(data.cache, key, task.features_of_captions)

    index = Path(run_options.folder) / "shards"

    def batches(seen: list, rank: int, world: int):
        return data.open(plan.seed, seen, rank, world, cache, task.reads_captions, index)

    def held_out():
        return dataclasses.replace(data, workers=0).open(plan.seed, cache=cache, index=index, validation=True)

    facts = partial(record.facts, data)
    learn(task, plan, run_options.folder, batches, cache, facts, held_out if data.held_out else None)


def _parsed(stage: str, arguments: list[str]) -> dict[str, str]:
    """What is given on the command line, as it stands there, by name."""
    parser = argparse.ArgumentParser(
        prog=f"wuerstchen train {stage}",
        description=f"Train {STAGES[stage][1]}. The same command goes on where a run was stopped.",
        epilog='Values are written as in TOML, texts without quotes: --prompts \'["a cat", "a dog"]\'. '
        "The defaults apply to what neither the command line nor the configuration has.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file of options; mini, v2, paper (then paper-2, …) and baseline are shipped",
    )
    parser.add_argument(
        "--write-config", metavar="FILE", help="write all options with their help to a TOML file, and do not train"
    )
    for name, type_, default, help in listed(*_classes(stage)):
        kind = getattr(type_, "__name__", "list") if not hasattr(type_, "__origin__") else "list"
        told = "must be given" if default is MISSING else f"default: {literal(default)}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            metavar=kind.upper(),
            help=f"{help} ({told})".strip().replace("%", "%%"),
        )
    return vars(parser.parse_args(arguments))


def _config_file(config: str, name: str) -> Path:
    """A shipped configuration by its name, or any file."""
    shipped = CONFIGS / config / f"{name}.toml"
    return shipped if os.path.isfile(shipped) and not os.path.isfile(config) else Path(config)
