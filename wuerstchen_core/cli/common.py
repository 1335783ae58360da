"""What several commands share: their parsers, the model that they run, and the pictures that they write."""

import argparse
from pathlib import Path

from ..util.errors import WuerstchenError


def command(commands, name: str, run, help: str, add_help: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", add_help=add_help)
    parser.set_defaults(run=run)
    return parser


# What may take the place of a network of the set, by the names that `Wuerstchen.from_files` has.
NETWORKS = {
    "stage_a": "Stage A",
    "stage_b": "Stage B",
    "stage_c": "Stage C",
    "semantic_compressor": "the semantic compressor",
    "text_encoder_c": "Stage C's text encoder (and Stage B's, where the set has one for both)",
    "text_encoder_b": "Stage B's text encoder",
}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a folder with a set of weights (default: the mini)"
    )
    for role, what in NETWORKS.items():
        name = "text-encoder" if role == "text_encoder_c" else role.replace("_", "-")
        parser.add_argument(f"--{name}", dest=role, type=Path, metavar="FILE", help=f"{what} from a file instead")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")


def load_model(options: argparse.Namespace):
    from ..checkpoints.sets import MINI, find_set
    from ..pipeline import Wuerstchen

    check_device(options.device)
    paths = find_set(MINI if options.model is None else options.model)
    given = given_networks(options)
    if paths["text_encoder_b"] == paths["text_encoder_c"] and "text_encoder_c" in given:
        given = {"text_encoder_b": given["text_encoder_c"]} | given
    return Wuerstchen.from_files(**paths | given, device=options.device)


def given_networks(options: argparse.Namespace) -> dict[str, Path]:
    return {role: path for role in NETWORKS if (path := getattr(options, role)) is not None}


def check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise WuerstchenError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from error


def check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise WuerstchenError(f"{path}: pictures are written as PNG, so the name must end in .png")
    if not path.absolute().parent.is_dir():
        raise WuerstchenError(f"{path.parent}: there is no such folder")
