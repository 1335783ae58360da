"""A run's checkpoints on disk: the last one, and the one before it in case the last is no good."""

import logging
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ...util.atomic import replacing
from ...util.errors import WuerstchenError, first_line

NUMBERED = "checkpoint-"

log = logging.getLogger(__name__)


class Damaged(Exception):
    """A checkpoint is missing or no good; the message says in what way."""


class Checkpoints:
    """`checkpoint.pt` and `checkpoint-before.pt` in a run's folder; only the lock's holder changes them.

    `keep` is how many there are, two at least: older ones are `checkpoint-0001000.pt`, by their steps.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep
        self.last = folder / "checkpoint.pt"
        self.before = folder / "checkpoint-before.pt"
        self.bad = folder / "checkpoint-bad.pt"

    def write(self, state: dict) -> None:
        """Makes `state` the last checkpoint, whole and on the disk, and the last one the one before. Raises OSError."""
        self._put_by()
        with replacing(self.last, keep=self.before) as partial:
            try:
                torch.save(state, partial)
            except RuntimeError:
                _ask_why(partial)
                raise

    def _put_by(self) -> None:
        """Names the one before by its step, if more than two are to be kept, and deletes those that are too old."""
        if self.keep <= 2:
            return
        if self.before.exists():
            with suppress(Damaged):
                older = self.folder / f"{NUMBERED}{_read(self.before)['step']:07}.pt"
                older.unlink(missing_ok=True)
                try:
                    os.link(self.before, older)
                except OSError:  # the disk has no hard links
                    os.replace(self.before, older)
        numbered = {int(path.stem[len(NUMBERED) :]): path for path in self.folder.glob(f"{NUMBERED}[0-9]*.pt")}
        for step in sorted(numbered)[: -(self.keep - 2)]:
            numbered[step].unlink(missing_ok=True)

    def read(self) -> dict:
        """The last checkpoint, on the CPU, mapped into memory. Raises Damaged."""
        return _read(self.last)

    def recover(self, check: Callable[[dict], None]) -> None:
        """Where the last checkpoint is missing or damaged, the one before takes its place.

        Args:
            check: raises Damaged where a state is no good, and WuerstchenError where it is another run's.

        Raises:
            WuerstchenError: both are no good, or `check` raises it.
        """
        if not os.path.lexists(self.last) and not os.path.lexists(self.before):
            return
        try:
            _whole(self.last, check)
            return
        except Damaged as damage:
            reason = first_line(damage)
        step = self.retreat(check)
        if step is None:
            raise WuerstchenError(
                f"{self.last}: not a checkpoint that can be read ({reason}), and there is no good one before it. Put a "
                "copy of it there, or train in another folder; --init can go on from the weights that were saved"
            )
        log.warning("%s: no good (%s); going on from the checkpoint before it, of step %d", self.last, reason, step)

    def retreat(self, check: Callable[[dict], None]) -> int | None:
        """The one before, if it is good, takes the place of the last, which is kept as `checkpoint-bad.pt`.

        Returns the step that it has, or None where there is no good one. Raises WuerstchenError as `recover`.
        """
        try:
            step = _whole(self.before, check)
        except Damaged:
            return None
        try:
            if os.path.lexists(self.last):
                os.replace(self.last, self.bad)
            os.replace(self.before, self.last)
        except OSError as error:
            raise WuerstchenError(
                f"{self.last}: {self.before.name} could not take its place ({error.strerror})"
            ) from error
        return step


def _whole(path: Path, check: Callable[[dict], None]) -> int:
    """The step of a checkpoint, of which nothing stays mapped into memory. Raises Damaged, and what `check` raises."""
    _verify(path)
    state = _read(path)
    check(state)
    return state["step"]


def _verify(path: Path) -> None:
    """Raises Damaged where the file is not the zip that torch writes, or one of its checksums is wrong."""
    if not os.path.lexists(path):
        raise Damaged("it is missing")
    if not path.is_file():
        raise Damaged("not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise Damaged("torch did not write it")
            wrong = archive.testzip()
    except Damaged:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise Damaged(first_line(error)) from error
    if wrong is not None:
        raise Damaged(f"the checksum of {wrong} in it is wrong")


def _read(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise Damaged(first_line(error)) from error


def _ask_why(partial: Path) -> None:
    """torch does not tell why it can't write: the disk is asked, by a plain write, which raises OSError."""
    with open(partial, "ab") as file:
        file.write(bytes(1 << 24))
        file.flush()
        os.fsync(file.fileno())
