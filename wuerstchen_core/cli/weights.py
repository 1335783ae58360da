"""`wuerstchen inspect` and `wuerstchen convert`."""

import argparse
from pathlib import Path

from ..util.errors import WuerstchenError
from .common import command


def add_commands(commands) -> None:
    inspect = command(commands, "inspect", _inspect, "say what a file of weights is, and which loader takes it")
    inspect.add_argument("file", type=Path, help="safetensors or PyTorch file, in any layout")

    convert = command(commands, "convert", _convert, "write a published file of weights as one of ours")
    convert.add_argument("file", type=Path, help="safetensors or PyTorch file, in any layout")
    convert.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a .safetensors file, or a folder: there every network of the file gets its usual name",
    )
    convert.add_argument("--part", metavar="NETWORK", help="which network, where the file holds several")
    convert.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: the file's own")


def _inspect(options: argparse.Namespace) -> None:
    from ..checkpoints.describe import describe

    for line in describe(options.file):
        print(line)


def _convert(options: argparse.Namespace) -> None:
    import torch
    from safetensors import SafetensorError

    from ..checkpoints.archive import open_archive
    from ..checkpoints.load import load_network, parts, save

    kinds = list(parts(open_archive(options.file)))
    if options.part is not None:
        if options.part not in kinds:
            raise WuerstchenError(f"{options.file}: there is no {options.part} in it, only {' and '.join(kinds)}")
        kinds = [options.part]
    into_folder = options.output.is_dir()
    if len(kinds) > 1 and not into_folder:
        raise WuerstchenError(
            f"{options.file}: it holds {' and '.join(kinds)}: name one with --part, or give a folder as -o for all"
        )
    if not into_folder and options.output.suffix != ".safetensors":
        raise WuerstchenError(f"{options.output}: neither a folder nor a name that ends in .safetensors")
    dtype = options.dtype and getattr(torch, options.dtype)
    for kind in kinds:
        path = options.output / f"{kind}.safetensors" if into_folder else options.output
        network = load_network(kind, options.file, dtype=dtype)
        try:
            save(network, path)
        except (OSError, SafetensorError) as error:
            raise WuerstchenError(f"{path}: could not be written ({error})") from error
        print(path)
