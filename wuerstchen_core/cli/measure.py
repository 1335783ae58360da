"""`wuerstchen benchmark` and `wuerstchen cost`."""

import argparse
from pathlib import Path

from .common import add_model, check_device, command, load_model


def add_commands(commands) -> None:
    benchmark = command(commands, "benchmark", _benchmark, "time loading and drawing")
    benchmark.add_argument(
        "--load",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only load these files of weights, in any layout, and tell the time and the peak of memory (Linux)",
    )
    benchmark.add_argument("--runs", type=int, default=3, metavar="N", help="pictures to draw (default: 3)")
    add_model(benchmark)

    cost = command(commands, "cost", _cost, "count parameters and operations, beside Stable Diffusion 2.1's")
    which = cost.add_mutually_exclusive_group()
    which.add_argument("--size", choices=["v2", "mini"], default="v2", help="default: v2, the released one")
    which.add_argument("--model", type=Path, metavar="FOLDER", help="instead, that of a folder with a set of weights")
    cost.add_argument("--width", type=int, default=1024, metavar="PIXELS", help="multiple of 8 (default: 1024)")
    cost.add_argument("--height", type=int, default=1024, metavar="PIXELS", help="multiple of 8 (default: 1024)")
    cost.add_argument("--steps-c", type=int, default=60, metavar="N", help="of Stage C (default: 60, as in the paper)")
    cost.add_argument("--steps-b", type=int, default=12, metavar="N", help="of Stage B (default: 12)")


def _benchmark(options: argparse.Namespace) -> None:
    from ..reports.benchmark import benchmark, benchmark_loading

    if options.load is None:
        lines = benchmark(lambda: load_model(options), options.runs)
    else:
        check_device(options.device)
        lines = (line for path in options.load for line in benchmark_loading(path, options.device))
    for line in lines:
        print(line, flush=True)


def _cost(options: argparse.Namespace) -> None:
    from ..checkpoints.sets import MINI
    from ..geometry import Geometry
    from ..reports.cost import cost, outline, released

    if options.model is not None:
        name, networks = str(options.model), outline(options.model)
    elif options.size == "mini":
        name, networks = "mini", outline(MINI)
    else:
        name, networks = "v2", released()
    for line in cost(networks, name, Geometry(options.width, options.height), options.steps_c, options.steps_b):
        print(line, flush=True)
