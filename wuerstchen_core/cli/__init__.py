"""The command line, `wuerstchen`: a file for each group of commands."""

import argparse
import sys

from ..util.errors import WuerstchenError
from . import generate, measure, mini, train, weights


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; an error that the user can mend is one line and exit status 2."""
    parser = _parser()
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and "stage" not in options:
        parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    try:
        options.run(options)
    except WuerstchenError as error:
        print(f"wuerstchen: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"wuerstchen: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"wuerstchen: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wuerstchen", description="Würstchen: text to image in three stages (arXiv 2306.00637)."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    generate.add_commands(commands)
    mini.add_data_command(commands)
    training = commands.add_parser("train", help="train networks").add_subparsers(metavar="WHAT", required=True)
    mini.add_train_command(training)
    train.add_commands(training)
    mini.add_evaluate_command(commands)
    weights.add_commands(commands)
    measure.add_commands(commands)
    return parser
