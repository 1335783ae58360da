"""`wuerstchen benchmark` and `wuerstchen cost`."""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..util.errors import WuerstchenError
from ..util.json_file import write_json
from .common import add_model, check_device, check_file, check_png, command, given_networks, load_model

AGAINST: dict[str, dict[str, Any]] = {
    "against": {"choices": ["diffusers"], "help": "time each stage beside its pipelines, in turn"},
    "size": {"choices": ["v2", "mini"], "help": "of the networks (default: v2, the released one; or that of --model)"},
    "width": {"type": int, "metavar": "PIXELS", "help": "multiple of 128 (default: 1024, of the mini 256)"},
    "height": {"type": int, "metavar": "PIXELS", "help": "multiple of 128 (default: 1024, of the mini 256)"},
    "batch": {
        "type": int,
        "nargs": "+",
        "metavar": "N",
        "help": "pictures at once, one or several sizes (default: 1); without --against, pictures a second",
    },
    "steps-c": {"type": int, "metavar": "N", "help": "of Stage C (default: 60, diffusers'; ours are timed, too)"},
    "steps-b": {"type": int, "metavar": "N", "help": "of Stage B (default: 12, diffusers'; ours are timed, too)"},
    "timed-steps": {
        "type": int,
        "metavar": "N",
        "help": "steps of a run, from which a picture's time is extrapolated (default: 3)",
    },
    "full": {"action": "store_true", "default": None, "help": "instead, time every step"},
    "plot": {"type": Path, "metavar": "FILE", "help": "a PNG file: time over batch size, by stage"},
    "json": {"type": Path, "metavar": "FILE", "help": "the figures as JSON"},
}


def add_commands(commands) -> None:
    benchmark = command(commands, "benchmark", _benchmark, "time loading and drawing")
    benchmark.add_argument(
        "--load",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only load these files of weights, in any layout, and tell the time and the peak of memory (Linux)",
    )
    benchmark.add_argument(
        "--runs", type=int, default=3, metavar="N", help="pictures to draw, or runs of each side (default: 3)"
    )
    add_model(benchmark)
    against = benchmark.add_argument_group("beside diffusers, with random weights")
    for name, options in AGAINST.items():
        against.add_argument(f"--{name}", **options)

    cost = command(commands, "cost", _cost, "count parameters and operations, beside Stable Diffusion 2.1's")
    which = cost.add_mutually_exclusive_group()
    which.add_argument("--size", choices=["v2", "mini"], default="v2", help="default: v2, the released one")
    which.add_argument("--model", type=Path, metavar="FOLDER", help="instead, that of a folder with a set of weights")
    cost.add_argument("--width", type=int, default=1024, metavar="PIXELS", help="multiple of 8 (default: 1024)")
    cost.add_argument("--height", type=int, default=1024, metavar="PIXELS", help="multiple of 8 (default: 1024)")
    cost.add_argument("--steps-c", type=int, default=60, metavar="N", help="of Stage C (default: 60, as in the paper)")
    cost.add_argument("--steps-b", type=int, default=12, metavar="N", help="of Stage B (default: 12)")


def _benchmark(options: argparse.Namespace) -> None:
    from ..reports.benchmark import benchmark, benchmark_batches, benchmark_loading

    if options.against is not None:
        _against_diffusers(options)
        return
    for name in AGAINST:
        if getattr(options, name.replace("-", "_")) is not None and (name != "batch" or options.load is not None):
            raise WuerstchenError(f"--{name} is an option of the comparison: add --against diffusers")
    if options.load is not None and options.dtype is not None:
        raise WuerstchenError("--load reads each file in its own precision: leave --dtype out")
    if options.load is None and options.batch is not None:
        lines = benchmark_batches(lambda: load_model(options), options.batch, options.runs)
    elif options.load is None:
        lines = benchmark(lambda: load_model(options), options.runs)
    else:
        check_device(options.device)
        lines = (line for path in options.load for line in benchmark_loading(path, options.device))
    for line in lines:
        print(line, flush=True)


def _against_diffusers(options: argparse.Namespace) -> None:
    import torch

    from ..geometry import MAX_SIDE, Geometry
    from ..pipeline import MAX_BATCH
    from ..reports.against_diffusers import STEP, STEPS_B, STEPS_C, Task
    from ..reports.benchmark import MAX_RUNS
    from ..reports.comparison import compare, plot, table
    from ..reports.diffusers_networks import require_diffusers
    from ..reports.plots import plotted
    from ..util.checks import whole_number

    for name, given in {"load": options.load, **given_networks(options)}.items():
        if given is not None:
            raise WuerstchenError(
                f"--{name.replace('_', '-')} is not for --against, which gives networks random weights: take --size or "
                "--model for their sizes"
            )
    if options.size is not None and options.model is not None:
        raise WuerstchenError("--size and --model are both sizes of the networks: give one")
    if options.full and options.timed_steps is not None:
        raise WuerstchenError("--full times every step: leave --timed-steps out")
    side = 256 if options.size == "mini" else 1024
    width, height = (
        whole_number(f"--{name}", side if given is None else given, STEP, MAX_SIDE, multiple_of=STEP)
        for name, given in (("width", options.width), ("height", options.height))
    )
    task = Task(
        Geometry(width, height),
        tuple(dict.fromkeys(whole_number("--batch", batch, 1, MAX_BATCH) for batch in options.batch or [1])),
        getattr(torch, options.dtype or "float32"),
        options.device,
        _steps("--steps-c", options.steps_c, STEPS_C),
        _steps("--steps-b", options.steps_b, STEPS_B),
    )
    timed = None if options.full else _steps("--timed-steps", options.timed_steps, 3)
    runs = whole_number("--runs", options.runs, 1, MAX_RUNS)
    check_device(options.device)
    require_diffusers()
    if options.json is not None:
        check_file(options.json)
    name, networks = _sizes(options)
    with ExitStack() as files:
        if options.plot is not None:
            check_png(options.plot)
            axes = files.enter_context(plotted(options.plot, panels=2))
        figures = compare(networks, name, task, runs, timed, lambda what: print(what, file=sys.stderr, flush=True))
        for line in table(figures):
            print(line)
        if options.json is not None:
            write_json(options.json, figures)
        if options.plot is not None:
            plot(figures, axes)


def _steps(option: str, given: int | None, default: int) -> int:
    from ..diffusion.schedule import MAX_STEPS
    from ..util.checks import whole_number

    return whole_number(option, default if given is None else given, 1, MAX_STEPS)


def _sizes(options: argparse.Namespace):
    """What the networks are called, and they themselves, without weights."""
    from ..checkpoints.sets import MINI
    from ..reports.cost import outline, released

    if options.model is not None:
        return str(options.model), outline(options.model)
    return ("mini", outline(MINI)) if options.size == "mini" else ("v2", released())


def _cost(options: argparse.Namespace) -> None:
    from ..geometry import Geometry
    from ..reports.cost import cost

    name, networks = _sizes(options)
    for line in cost(networks, name, Geometry(options.width, options.height), options.steps_c, options.steps_b):
        print(line, flush=True)
