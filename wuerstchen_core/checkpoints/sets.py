"""A whole set of weights: the files of a folder, by the names that the pipeline has for them."""

from pathlib import Path

from ..util.errors import WuerstchenError
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


def find_set(folder: str | Path) -> dict[str, Path]:
    """The files of a folder that holds a whole set; there is no "previewer" where the folder has none.

    Raises WuerstchenError naming those that are missing, or where the folder cannot be searched.
    """
    paths = {role: Path(folder) / name for role, name in SET.items()}
    if not is_there(paths["text_encoder_b"]):
        paths["text_encoder_b"] = paths["text_encoder_c"]
    if not is_there(paths["previewer"]):
        del paths["previewer"]
    missing = [path.name for path in paths.values() if not is_there(path)]
    if missing:
        raise WuerstchenError(f"{folder}: not a whole set of weights, {', '.join(dict.fromkeys(missing))} missing")
    return paths
