"""What several commands share: their parsers, the model that they run, and the pictures that they write."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from ..util.errors import WuerstchenError, first_line, one_line
from ..workflow.drawing import Circumstances


class Parser(argparse.ArgumentParser):
    """argparse's, with errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"wuerstchen: {message} (see {self.prog} --help)") + "\n")


def command(commands, name: str, run, help: str, add_help: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", add_help=add_help)
    parser.set_defaults(run=run)
    return parser


DTYPES = ("float32", "bfloat16", "float16")
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
        "--model", type=Path, metavar="FOLDER", help="a folder, or a bundle, of a set of weights (default: the mini)"
    )
    for role, what in NETWORKS.items():
        name = "text-encoder" if role == "text_encoder_c" else role.replace("_", "-")
        parser.add_argument(f"--{name}", dest=role, type=Path, metavar="FILE", help=f"{what} from a file instead")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of all networks (default: float32, but for Stages C and B the one that is fast on the device)",
    )


def load_model(options: argparse.Namespace, offload: bool | None = False):
    import torch

    from ..checkpoints.sets import MINI, find_distilled, find_set
    from ..pipeline import Wuerstchen

    check_device(options.device)
    folder, given = MINI if options.model is None else options.model, given_networks(options)
    paths: dict[str, Any] = find_set(folder, given)
    distilled = {} if given else find_distilled(folder)  # which are of the set's own networks
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    return Wuerstchen.from_files(**paths, distilled=distilled, device=options.device, dtype=dtype, offload=offload)


def given_networks(options: argparse.Namespace) -> dict[str, Path]:
    return {role: path for role in NETWORKS if (path := getattr(options, role)) is not None}


def told_of_model(options: argparse.Namespace, model) -> dict[str, Any]:
    """What a picture says of the networks that drew it."""
    import torch

    from ..util.precision import dtype_of, name_of

    told = {"device": options.device}
    if dtype_of(model.stage_c) != torch.float32:
        told["dtype"] = name_of(dtype_of(model.stage_c))
    told["model"] = "mini" if options.model is None else options.model.absolute().name
    return told | {role: path.name for role, path in given_networks(options).items()}


def circumstances(model, image: Path | None, loras_of_stage_b: frozenset[str] = frozenset()) -> Circumstances:
    from PIL import Image

    transparent = profile = False
    if image is not None:
        with Image.open(image) as opened:
            transparent, profile = opened.has_transparency_data, "icc_profile" in opened.info
    return Circumstances(
        one_text_encoder=model.text_encoder_b is model.text_encoder_c,
        text_for_stage_b=model.text_encoder_b is not None,
        transparent=transparent,
        has_profile=profile,
        loras_of_stage_b=loras_of_stage_b,
    )


def check_device(name: str) -> None:
    import torch

    try:
        torch.zeros(1, device=name).item()  # which "meta", a device without values, can't do
    except Exception as error:  # what torch raises depends on how it was built
        raise WuerstchenError(f"device {name!r} can't be used: {first_line(error)}") from error


def check_text(option: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise WuerstchenError(
            f"{option} is not UTF-8: {text!a:.80} has a byte that is no letter there, at position {error.start}"
        ) from error


def check_png(path: Path) -> None:
    """Raises WuerstchenError where no picture can be written to `path`, so that it is known before one is drawn."""
    if path.suffix.lower() != ".png":
        raise WuerstchenError(f"{path}: pictures are written as PNG, so the name must end in .png")
    check_file(path)


def check_file(path: Path) -> None:
    """Raises WuerstchenError where no file can be written to `path`."""
    if not path.absolute().parent.is_dir():
        raise WuerstchenError(f"{path.parent}: there is no such folder")
    if path.exists() and not path.is_file():
        raise WuerstchenError(f"{path}: there is something of that name that is not a file")
    beside = path.with_name(f".{path.name}.{'x' * 16}")  # as long as a batch's names and those of partial files are
    try:
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise WuerstchenError(f"{path}: nothing can be written there ({error.strerror})") from error
