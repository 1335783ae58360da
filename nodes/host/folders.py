"""Where ComfyUI's users keep their weights: names that its widgets show -> files."""

from pathlib import Path

import folder_paths

from ...wuerstchen_core import WuerstchenError
from ...wuerstchen_core.checkpoints.sets import MINI, find_set

FOLDER = "wuerstchen"
# Where ComfyUI's users keep what, the likeliest first; the authors' file of Stage B holds the semantic compressor too.
FOLDERS = {
    "stage_a": ("vae", "checkpoints", FOLDER),
    "stage_b": ("diffusion_models", "checkpoints", FOLDER),
    "stage_c": ("diffusion_models", "checkpoints", FOLDER),
    "text_encoder": ("text_encoders", "checkpoints", FOLDER),
    "semantic_compressor": ("clip_vision", "diffusion_models", "checkpoints", FOLDER),
    "previewer": ("vae_approx", "checkpoints", FOLDER),
    "lora": ("loras",),
}

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def model_sets() -> dict[str, Path]:
    """Name -> folder of every whole set of weights: the mini, and the subfolders of ComfyUI's models/wuerstchen."""
    sets = {"mini": MINI}
    for root in folder_paths.get_folder_paths(FOLDER):
        for folder in sorted(path for path in Path(root).glob("*") if path.is_dir()):
            try:
                find_set(folder)
            except WuerstchenError:
                continue
            sets.setdefault(folder.name, folder)
    return sets


def set_folder(name: str) -> Path:
    """The folder of a set's name; nothing but the names that `model_sets` has is a way to one."""
    sets = model_sets()
    if name not in sets:
        raise WuerstchenError(
            f"{name}: there is no whole set of that name in models/{FOLDER}; take {' or '.join(sets)}"
        )
    return sets[name]


def weight_files(kind: str) -> dict[str, Path]:
    """Name -> file of everything that ComfyUI lists in the folders of a kind of network.

    The names are those that ComfyUI's own loaders show. Of several files of one name, all but the first have their
    folder behind it: `model.safetensors [checkpoints]`, or `[checkpoints 2]` in the second of that folder's places.
    """
    found: dict[str, dict[str, Path]] = {}  # name -> folder -> file
    for folder in FOLDERS[kind]:
        names = folder_paths.get_filename_list(folder)
        for name in folder_paths.filter_files_extensions(names, folder_paths.supported_pt_extensions):
            others = found.setdefault(name, {})
            for place, root in enumerate(folder_paths.get_folder_paths(folder), start=1):
                path = Path(root, name)
                if path.is_file() and not any(path.samefile(other) for other in others.values()):
                    others[folder if place == 1 else f"{folder} {place}"] = path
    return {
        f"{name} [{folder}]" if i else name: path
        for name, others in found.items()
        for i, (folder, path) in enumerate(others.items())
    }


def places(kind: str) -> str:
    """The folders of a kind of network, for people."""
    *others, last = (f"models/{folder}" for folder in FOLDERS[kind])
    return f"{', '.join(others)} or {last}" if others else last


def listed_file(kind: str, name: str) -> Path:
    """The file of a name; nothing but the names that `weight_files` has is a way to one."""
    listed = weight_files(kind)
    if name not in listed:
        place = "one of them" if len(FOLDERS[kind]) > 1 else "it"
        raise WuerstchenError(
            f"{name}: there is no such file in {places(kind)}: put it into {place} and press R, or choose another"
        )
    return listed[name]
