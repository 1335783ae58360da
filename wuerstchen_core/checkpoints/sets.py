"""A whole set of weights: the files of a folder, or of a bundle, by the names that the pipeline has for them."""

import os
from collections.abc import Mapping
from pathlib import Path

from ..util.errors import WuerstchenError
from .archive import members, open_archive
from .load import parts
from .stored import is_there

MINI = Path(__file__).parents[1] / "mini" / "weights"  # the set in the repository
LINEAR_PREVIEW = MINI / "linear_preview.safetensors"  # a colour for each position; fitted to the mini

# A folder's whole set, by the names that `Wuerstchen.from_files` has for it. Stage B's own text encoder and the
# previewer are optional.
SET = {
    "stage_a": "stage_a.safetensors",
    "stage_b": "stage_b.safetensors",
    "stage_c": "stage_c.safetensors",
    "text_encoder_c": "text_encoder.safetensors",
    "text_encoder_b": "text_encoder_b.safetensors",
    "semantic_compressor": "semantic_compressor.safetensors",
    "previewer": "previewer.safetensors",
}
OPTIONAL = ("text_encoder_b", "previewer")

# LoRAs with which a set's stages draw in a few steps without guidance: `wuerstchen train distill` writes them.
DISTILLED = {"stage_c": "stage_c_distilled.safetensors", "stage_b": "stage_b_distilled.safetensors"}


def distilled_name(model: str, stage: str) -> str:
    """What a set's distilled network is called among LoRAs; stage: "stage_c" or "stage_b"."""
    return f"{model}: few steps (Stage {stage[-1].upper()})"


def find_set(folder: str | Path, given: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """The files of a folder, or of a bundle, that holds a whole set, those of `given` in the place of its own.

    There is no "previewer" where the folder has none. Where it has no text encoder for Stage B, that is Stage C's if
    its states have the width that Stage B reads, and else there is no "text_encoder_b".

    Raises WuerstchenError naming those that are missing, or where the folder cannot be searched.
    """
    paths = _files(Path(folder), SET)
    missing = [name for role, name in SET.items() if role not in OPTIONAL and role not in paths]
    if missing:
        raise WuerstchenError(f"{folder}: not a whole set of weights, {', '.join(missing)} missing")
    paths |= given or {}
    if "text_encoder_b" not in paths and _fits_stage_b(paths["text_encoder_c"], paths["stage_b"]):
        paths["text_encoder_b"] = paths["text_encoder_c"]
    return paths


def find_distilled(folder: str | Path) -> dict[str, Path]:
    """Stage -> file of the LoRAs in `DISTILLED` that a folder or a bundle has: both, one or none."""
    return _files(Path(folder), DISTILLED)


def files_to_bundle(folder: str | Path) -> dict[str, Path]:
    """Name in a bundle -> file, of a whole set and its distilled networks. Raises WuerstchenError as `find_set`."""
    find_set(folder)
    names = SET | {f"{stage} distilled": name for stage, name in DISTILLED.items()}
    return {Path(names[role]).stem: path for role, path in _files(Path(folder), names).items()}


def _files(model: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """Those of some files that a folder or a bundle has."""
    if not os.path.isfile(model):
        return {role: model / name for role, name in names.items() if is_there(model / name)}
    held = members(open_archive(model))
    if not held:
        raise WuerstchenError(
            f"{model}: one file, and no bundle of a whole set: name a folder with the set, or a bundle, as "
            "`wuerstchen convert --bundle` writes it"
        )
    return {role: model / stem for role, name in names.items() if (stem := Path(name).stem) in held}


def _fits_stage_b(text_encoder: Path, stage_b: Path) -> bool:
    try:
        encoder = parts(open_archive(text_encoder))["text_encoder"].config
        return encoder.width == parts(open_archive(stage_b))["stage_b"].config.text_width
    except (KeyError, WuerstchenError):
        return True  # what is wrong with the files is the loaders' to say
