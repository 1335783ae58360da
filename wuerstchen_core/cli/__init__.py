"""The command line, `wuerstchen`: a file for each group of commands."""

import argparse
import io
import os
import sys

from ..util.errors import WuerstchenError, one_line
from . import drawn, evaluate, generate, measure, mini, train, weights
from .common import Parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; an error that the user can mend is one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe of another encoding has no ü and no emoji: spell them out
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.rest = rest
    if rest and "stage" not in options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written at the end
        return 141
    except WuerstchenError as error:
        print(f"wuerstchen: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        told = f"{error.filename or 'a file'}: {error.strerror or error}"
        print(f"wuerstchen: {one_line(told)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print("wuerstchen: out of memory: take a smaller --width, --height or --batch", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"wuerstchen: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _out_of_memory(error: Exception) -> bool:
    """Whether it is Python's or one of torch's reports of that, which on the CPU is a RuntimeError like any other."""
    name = type(error).__name__
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="wuerstchen", description="Würstchen: text to image in three stages (arXiv 2306.00637).")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    generate.add_commands(commands)
    mini.add_data_command(commands)
    training = commands.add_parser("train", help="train networks").add_subparsers(metavar="WHAT", required=True)
    mini.add_train_command(training)
    train.add_commands(training)
    evaluation = commands.add_parser("evaluate", help="measure models").add_subparsers(metavar="WHAT", required=True)
    mini.add_evaluate_commands(evaluation)
    evaluate.add_commands(evaluation)
    drawn.add_commands(evaluation)
    weights.add_commands(commands)
    measure.add_commands(commands)
    return parser
