"""`wuerstchen inspect`, `wuerstchen convert` and `wuerstchen merge`."""

import argparse
from pathlib import Path

from ..util.errors import WuerstchenError
from .common import command

SUFFIX = ".safetensors"
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn"]


def add_commands(commands) -> None:
    inspect = command(commands, "inspect", _inspect, "say what a file of weights is, and which loader takes it")
    inspect.add_argument("file", type=Path, help="safetensors or PyTorch file, in any layout")

    convert = command(commands, "convert", _convert, "write a published file of weights as one of ours")
    convert.add_argument("file", type=Path, help="safetensors or PyTorch file, in any layout; with --bundle a folder")
    convert.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a .safetensors file, or a folder: there every network of the file gets its usual name",
    )
    convert.add_argument("--part", metavar="NETWORK", help="which network, where the file holds several")
    convert.add_argument("--bundle", action="store_true", help="a folder with a whole set, as one file")
    _add_dtype(convert)
    convert.add_argument("--shard-size", metavar="SIZE", help="in parts of at most so many bytes: 2GB, 500MB")

    merge = command(commands, "merge", _merge, "write the weighted mean of networks, or sum of LoRAs")
    merge.add_argument("files", type=Path, nargs="+", metavar="FILE", help="two or more of one kind, in any layouts")
    merge.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one per file; of networks they sum to 1 (default: equal)"
    )
    merge.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a .safetensors file")
    merge.add_argument("--part", metavar="NETWORK", help="which network, where the files hold several")
    _add_dtype(merge)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: the file's own; float8_e4m3fn is for large matrices alone, in a bundle those of Stages B and C, "
        "and all else is then in float16",
    )


def _inspect(options: argparse.Namespace) -> None:
    from ..checkpoints.describe import describe

    for line in describe(options.file):
        print(line)


def _convert(options: argparse.Namespace) -> None:
    from ..checkpoints.archive import members, open_archive
    from ..checkpoints.contents import bundle, file_contents, network_contents, size_in_bytes, write
    from ..checkpoints.load import parts
    from ..checkpoints.lora import is_lora
    from ..checkpoints.sets import files_to_bundle

    dtype = _dtype(options.dtype)
    largest = None if options.shard_size is None else size_in_bytes("--shard-size", options.shard_size)
    if options.bundle:
        if options.part is not None:
            raise WuerstchenError("--bundle is for a whole set: leave --part out")
        _check_output(options.output)
        for path in write(bundle(files_to_bundle(options.file), dtype), options.output, largest):
            print(path)
        return
    archive = open_archive(options.file)
    bundled = members(archive)
    kinds = list(bundled or parts(archive))
    if options.part is not None:
        if options.part not in kinds:
            raise WuerstchenError(f"{options.file}: there is no {options.part} in it, only {' and '.join(kinds)}")
        kinds = [options.part]
    into_folder = options.output.is_dir()
    if len(kinds) > 1 and not into_folder:
        raise WuerstchenError(
            f"{options.file}: it holds {' and '.join(kinds)}: name one with --part, or give a folder as -o for all"
        )
    if not into_folder and options.output.suffix != SUFFIX:
        raise WuerstchenError(f"{options.output}: neither a folder nor a name that ends in {SUFFIX}")
    for kind in kinds:
        path = options.output / f"{kind}{SUFFIX}" if into_folder else options.output
        source = open_archive(archive.path / kind) if bundled else archive
        if is_lora(source):
            contents = file_contents(source)
        else:
            contents = network_contents(source, next(iter(parts(source))) if bundled else kind, dtype)
        for written in write(contents, path, largest):
            print(written)


def _merge(options: argparse.Namespace) -> None:
    from ..checkpoints.contents import write
    from ..checkpoints.merge import merge

    _check_output(options.output)
    contents = merge(options.files, options.weights, options.part, _dtype(options.dtype))
    for path in write(contents, options.output):
        print(path)


def _check_output(path: Path) -> None:
    if path.is_dir() or path.suffix != SUFFIX:
        raise WuerstchenError(f"{path}: expected the name of a file that ends in {SUFFIX}")


def _dtype(name: str | None):
    import torch

    return None if name is None else getattr(torch, name)
