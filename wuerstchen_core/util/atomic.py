import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path, keep: str | Path | None = None, sync: bool = True) -> Iterator[Path]:
    """A path to write to; what was written takes the place of `path` at the end, and nothing is left on an error.

    It lies in a folder of its own beside `path`, which nobody else may enter, and keeps its name. The new file has the
    permissions that the umask gives. A process that is killed leaves that folder: see `remove_partials`.

    Args:
        keep: where the file that was at `path` goes; without, it is deleted. There is one at `path` all the time.
        sync: whether the file is on the disk before it takes its place, so that a power cut leaves one or the other.

    Raises:
        OSError: it can't be written. What was at `path` is still there.
    """
    path = Path(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        error.filename = str(path)
        raise
    partial = folder / path.name
    try:
        partial.touch()
        mode = partial.stat().st_mode
        partial.unlink()
        yield partial
        if sync:
            _sync(partial)
        partial.chmod(mode)
        if keep is not None and path.exists():
            _keep(path, keep, folder / "kept")
        os.replace(partial, path)
        if sync and os.name != "nt":  # Windows opens no folders
            with suppress(OSError):  # some network disks can't, and the file is written
                _sync(path.parent)
    except OSError as error:
        if str(error.filename).startswith(str(folder)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Deletes what processes that were killed in `replacing` have left in a folder. Raises OSError."""
    for left in folder.glob(".*.partial"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _keep(path: Path, keep: str | Path, link: Path) -> None:
    """The file at `path` is at `keep` too; on a disk without hard links, it is there alone."""
    try:
        os.link(path, link)
    except OSError:
        link = path
    os.replace(link, keep)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
