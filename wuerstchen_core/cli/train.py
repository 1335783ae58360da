"""`wuerstchen train STAGE`."""

import argparse

from ..training import command as training
from .common import command


def add_commands(train) -> None:
    for stage, (_, what) in training.STAGES.items():
        parser = command(train, stage, _train, f"{what}; --help lists its options", add_help=False)
        parser.set_defaults(stage=stage)


def _train(options: argparse.Namespace) -> None:
    from ..mini.source import emoji_source
    from ..training.data.sources import register

    register(emoji_source)
    training.run(options.stage, options.rest)
