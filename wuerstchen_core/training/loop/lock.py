"""The lock on a run's folder: it belongs to one process, and dies with it."""

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...util.errors import WuerstchenError

NAME = "run.lock"
LOCKED_BYTE = 1 << 30  # Windows keeps others from reading what is locked: a byte behind all that is written

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps all other runs out of a folder. The file `run.lock` in it names the process; it may stay there.

    Raises:
        WuerstchenError: another run is using the folder, or nothing can be written there.
    """
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise WuerstchenError(f"{path}: could not be written ({error.strerror})") from error
    _open.add(descriptor)
    try:
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK):
                raise WuerstchenError(
                    f"{folder}: another run is using it ({_holder(path)}): wait until it is done, end it, or train in "
                    "another folder"
                ) from error
            log.warning("%s: can't be locked (%s): see that no other run uses it", folder, error.strerror)
        told = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, told.encode())
        yield
    finally:
        _open.remove(descriptor)
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return " ".join(path.read_bytes()[:150].decode().split()) or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


_open: set[int] = set()


def _leave() -> None:
    """A loader that was forked would keep the lock when its parent is killed."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


if os.name == "nt":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    os.register_at_fork(after_in_child=_leave)

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
