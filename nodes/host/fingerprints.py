"""What tells ComfyUI that a file has changed since a loader read it."""

import os
from pathlib import Path

from ...wuerstchen_core import WuerstchenError
from ...wuerstchen_core.checkpoints.sets import find_set
from .folders import listed_file, model_set


def of_files(**names: str | None) -> tuple:
    """Kind -> name of a file, as `listed_file` has them. Never raises: what is missing is the loader's to say."""
    found: list[tuple | None] = []
    for kind, name in names.items():
        try:
            found.append(_stamp(listed_file(kind, name)) if name else None)
        except (WuerstchenError, OSError, ValueError, TypeError):
            found.append((str(name), "missing"))
    return tuple(found)


def of_set(name: str) -> tuple:
    """All files of a set. Never raises."""
    try:
        return tuple(_stamp(path) for path in find_set(model_set(name)).values())
    except (WuerstchenError, OSError, ValueError, TypeError):
        return (str(name), "missing")


def _stamp(path: Path) -> tuple[str, int, int]:
    status = os.stat(path if path.exists() else path.parent)  # a bundle, in which it is
    return str(path), status.st_mtime_ns, status.st_size
