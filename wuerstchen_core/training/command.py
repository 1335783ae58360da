"""`wuerstchen train STAGE`: the options of a stage, from its configuration file and the command line, and its run."""

import argparse
import importlib
import json
from dataclasses import MISSING, dataclass
from pathlib import Path

from ..util.errors import WuerstchenError
from .options import listed, load, option, override, read_all

CONFIGS = Path(__file__).parent / "configs"

# Stage -> the module with its `Options` and `build`, and what the help says.
STAGES = {
    "stage-a": ("stage_a", "Stage A, from pictures to latents and back, against an adversary"),
    "stage-b": ("stage_b", "Stage B, from semantic latents to Stage A's, and the semantic compressor with it"),
    "stage-c": ("stage_c", "Stage C, from text to semantic latents"),
    "previewer": ("previewer", "a previewer, from semantic latents to small pictures"),
    "lora": ("lora", "a LoRA, a small file that changes Stage C"),
}


@dataclass(frozen=True)
class RunOptions:
    folder: str = option(help="where the run keeps its checkpoint, weights, samples and logs")


def run(stage: str, arguments: list[str]) -> None:
    """Trains a stage with the options that `wuerstchen train STAGE` is given.

    Raises:
        WuerstchenError: an option is unknown or out of its range, or what `run.train` raises.
    """
    from .data.options import DataOptions, check_no_commands
    from .loop.run import Plan

    module = importlib.import_module(f".stages.{STAGES[stage][0]}", __package__)
    classes = (RunOptions, DataOptions, Plan, module.Options)
    config, given = _parsed(stage, classes, arguments)
    path = _config_file(config, STAGES[stage][0])
    table = load(path)
    if "data" not in given:
        check_no_commands(table, str(path))
    run_options, data, plan, options = read_all(classes, override(classes, table, given), str(path))
    _train(module, run_options, data, plan, options)


def _train(module, run_options: RunOptions, data, plan, options) -> None:
    import torch

    from .data.feature_cache import FeatureCache, fingerprint
    from .loop.run import train

    torch.manual_seed(plan.seed)
    task = module.build(options, data)
    cache = None
    if data.cache:
        if not task.feature_files:
            raise WuerstchenError("cache: with these options no network is frozen, so there is nothing to keep")
        key = f"{type(task).__name__} {task.feature_key} {fingerprint(*task.feature_files)}"
        cache = FeatureCache(data.cache, key)

    def batches(first: int, rank: int, world: int):
        return data.open(plan.seed, first, rank, world, cache, task.reads_captions)

    train(task, plan, run_options.folder, batches, cache)


def _parsed(stage: str, classes: tuple[type, ...], arguments: list[str]) -> tuple[str, dict[str, str]]:
    parser = argparse.ArgumentParser(
        prog=f"wuerstchen train {stage}",
        description=f"Train {STAGES[stage][1]}. The same command goes on where a run was stopped.",
        epilog='Values are written as in TOML, texts without quotes: --prompts \'["a cat", "a dog"]\'. '
        "The defaults are those where the configuration file has none.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a TOML file; mini and v2 are shipped")
    for name, type_, default, help in listed(*classes):
        kind = getattr(type_, "__name__", "list") if not hasattr(type_, "__origin__") else "list"
        told = "must be given" if default is MISSING else f"default: {_literal(default)}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar=kind.upper(),
            help=f"{help} ({told})".strip().replace("%", "%%"),
        )
    given = vars(parser.parse_args(arguments))
    return given.pop("config"), given


def _config_file(config: str, name: str) -> Path:
    """A shipped configuration by its name, or any file."""
    shipped = CONFIGS / config / f"{name}.toml"
    return shipped if shipped.is_file() and not Path(config).is_file() else Path(config)


def _literal(value) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False)
