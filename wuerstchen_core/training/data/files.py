"""The files of a data set: what is data in a folder and what other programs left there."""

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ...util.errors import WuerstchenError

# Folders and files of other programs, in lower case. Hidden ones, whose names begin with a dot, are left out as well.
LEFTOVERS = frozenset(
    ("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin")
    + ("recycler", "system volume information", "lost+found")
)

log = logging.getLogger(__name__)


def is_leftover(path: str) -> bool:
    """Whether a file or one of its folders is hidden or belongs to a tool: `.ipynb_checkpoints/a.png`, `._a.png`."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return any(part.lower() in LEFTOVERS or (part.startswith(".") and part.strip(".")) for part in parts)


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to `folder`, with slashes; names of its files) for the folder and all below it.

    Leftovers are left out. Linked folders are followed, but no folder is visited twice. A folder that can't be read is
    skipped with a warning. Raises WuerstchenError if `folder` itself is not a folder that can be read.
    """
    pending, links = [""], []
    visited = set()
    while pending or links:
        inside = pending.pop() if pending else links.pop(0)
        try:
            status = os.stat(folder / inside)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder / inside) as entries:
                kept = sorted((entry for entry in entries if not is_leftover(entry.name)), key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise WuerstchenError(f"{folder}: the folder can't be read ({error.strerror})") from error
            log.warning("skipped the folder %s: %s", readable(inside), error.strerror)
            continue
        names = []
        for entry in kept:
            path = f"{inside}/{entry.name}" if inside else entry.name
            if not _is_folder(entry):
                names.append(entry.name)
            elif entry.is_symlink():
                links.append(path)
            else:
                pending.append(path)
        yield inside, names


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def check_regular(path: str | Path) -> None:
    """Raises ValueError for anything but a regular file (a named pipe would block), OSError if it is missing."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a regular file. Raises ValueError if it has more than `most` bytes or is no regular file."""
    check_regular(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{Path(path).name} has more than {most} bytes")
    return content


def readable(text: object, most: int = 300) -> str:
    """The text on one line, without control characters, shortened to `most` characters: for messages."""
    line = " ".join(str(text)[: 4 * most].split())
    line = "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)
    return line if len(line) <= most else f"{line[: most - 3]}..."
