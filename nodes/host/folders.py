"""Where ComfyUI's users keep their weights: names that its widgets show -> files."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import folder_paths

from ...wuerstchen_core import WuerstchenError
from ...wuerstchen_core.checkpoints.archive import INDEX, SHARD, members, open_archive
from ...wuerstchen_core.checkpoints.published import PUBLISHED
from ...wuerstchen_core.checkpoints.sets import MINI, SET, distilled_name, find_distilled, find_set

FOLDER = "wuerstchen"
# The folders for each kind of network, the likeliest first; the authors' file of Stage B also holds the compressor.
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
    """Name -> folder or bundle of every whole set of weights: the mini, and those in ComfyUI's models/wuerstchen.

    An incomplete one is left out, and the log says once what it lacks.
    """
    sets = {"mini": MINI}
    for place in (*_subfolders(), *_bundles()):
        try:
            find_set(place)
        except (WuerstchenError, OSError) as error:
            if place.is_file() or any(_passes((place / name).exists) for name in SET.values()):
                warn_once(f"Würstchen: {error}")
            continue
        sets.setdefault(place.name, place)
    return sets


def model_set(name: str) -> Path:
    """The folder or bundle of a set by its name, and by nothing else.

    Raises WuerstchenError if there is none of that name, or if it is incomplete, naming the files that are missing.
    """
    sets = model_sets()
    if name in sets:
        return sets[name]
    for place in (*_subfolders(), *_bundles()):
        if place.name == name:
            try:
                find_set(place)
            except OSError as error:
                raise WuerstchenError(f"{place}: can't be read ({error.strerror})") from error
    raise WuerstchenError(f"{name}: there is no whole set of that name in models/{FOLDER}; take {' or '.join(sets)}")


def weight_files(kind: str) -> dict[str, Path]:
    """Name -> file of everything that ComfyUI lists in the folders for a kind of network.

    The names are those that ComfyUI's own loaders show. If several files share a name, all but the first are followed
    by their folder: `model.safetensors [checkpoints]`, or `[checkpoints 2]` in the second place for that folder. LoRAs
    end with those of the sets' distilled networks: `mini: few steps (Stage C)`.
    """
    found: dict[str, dict[str, Path]] = {}  # name -> folder -> file
    for folder in FOLDERS[kind]:
        names = folder_paths.get_filename_list(folder)
        for name in folder_paths.filter_files_extensions(names, folder_paths.supported_pt_extensions):
            others = found.setdefault(name, {})
            for place, root in enumerate(folder_paths.get_folder_paths(folder), start=1):
                path = Path(root, name)
                if _passes(path.is_file) and not any(path.samefile(other) for other in others.values()):
                    others[folder if place == 1 else f"{folder} {place}"] = path
    files = {
        f"{name} [{folder}]" if i else name: path
        for name, others in found.items()
        for i, (folder, path) in enumerate(others.items())
    }
    return files | _distilled() if kind == "lora" else files


def places(kind: str) -> str:
    """The folders for a kind of network, for people."""
    *others, last = (f"models/{folder}" for folder in FOLDERS[kind])
    return f"{', '.join(others)} or {last}" if others else last


def listed_file(kind: str, name: str) -> Path:
    """The file of a name in `weight_files`, and of no other; a workflow from Windows has backslashes in it.

    Raises WuerstchenError.
    """
    listed = weight_files(kind)
    by_slashes = {_slashes(other): path for other, path in listed.items()}
    path = listed.get(name) or by_slashes.get(_slashes(name))
    if path is None:
        missing = f"{name}: there is no such file in {places(kind)}"
        published = PUBLISHED.get(_slashes(name).rpartition("/")[2])
        if published is not None:
            raise WuerstchenError(
                f"{missing}: fetch {published.url} (about {published.size}), save it there under this name and press R"
            )
        place = "one of them" if len(FOLDERS[kind]) > 1 else "it"
        raise WuerstchenError(f"{missing}: put it into {place} and press R, or choose another")
    return path


def _distilled() -> dict[str, Path]:
    return {
        distilled_name(name, stage): path
        for name, folder in model_sets().items()
        for stage, path in find_distilled(folder).items()
    }


def what_is_missing(**names: str | None) -> bool | str:
    """Kind -> name of a file: True if all are there, else what to say of the first that is not."""
    try:
        for kind, name in names.items():
            if name is not None:
                listed_file(kind, name)
    except WuerstchenError as error:
        return str(error)
    return True


def what_is_missing_in_set(name: str | None) -> bool | str:
    """The same for a set by its name."""
    try:
        if name is not None:
            model_set(name)
    except WuerstchenError as error:
        return str(error)
    return True


def _slashes(name: str) -> str:
    return str(name).replace("\\", "/")


def _subfolders() -> list[Path]:
    return [path for path in _entries() if _passes(path.is_dir)]


def _bundles() -> list[Path]:
    """The files that are bundles, or the index of one in several parts."""
    return [path for path in _entries() if _may_be_bundle(path) and _is_bundle(path)]


def _may_be_bundle(path: Path) -> bool:
    whole = path.suffix == ".safetensors" and not SHARD.fullmatch(path.name)
    return (whole or bool(INDEX.fullmatch(path.name))) and _passes(path.is_file)


def _is_bundle(path: Path) -> bool:
    try:
        return bool(members(open_archive(path)))
    except (WuerstchenError, OSError):
        return False


def _entries() -> list[Path]:
    """Of all places of models/wuerstchen that can be read."""
    found: list[Path] = []
    for root in folder_paths.get_folder_paths(FOLDER):
        try:
            found += sorted(Path(root).iterdir())
        except OSError:
            continue
    return found


def _passes(test: Callable[[], bool]) -> bool:
    """Whether a question about a file is answered with yes; no is what an unreadable folder answers."""
    try:
        return test()
    except OSError:
        return False


@cache
def warn_once(message: str) -> None:
    """Writes to ComfyUI's log what has not been written there before."""
    logging.warning(message)
