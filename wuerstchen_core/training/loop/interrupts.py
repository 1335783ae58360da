import os
import signal
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While it is entered, the first SIGINT (Ctrl-C) or SIGTERM only sets `asked`; a second one ends the process.

    With `launched`, the end of the parent process, such as `accelerate launch`, asks as well.
    """

    def __init__(self, launched: bool = False):
        self._asked = False
        self._parent = os.getppid() if launched else None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            self._asked = True
            _tell("the launcher has ended: stopping after this step, and saving")
        return self._asked

    def defer_loaders(self) -> None:
        """From now on the death of a loader's process is told where the next batch is asked for.

        torch's own handler raises wherever the program is, even between the updates of two weights. It is installed
        with the first batch, so this is to be called after it.
        """
        if self._before and hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in self._before:
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _ask(self, number: int, frame) -> None:
        self._asked = True
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        _tell("stopping after this step, and saving; once more to end at once")


class Agreement:
    """Whether any of a run's processes was asked to stop. It goes from CPU to CPU: nothing waits for the device."""

    def __init__(self, processes: int):
        self._alone = processes == 1
        self._group: Any = None if self._alone or dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def any(self, asked: bool) -> bool:
        """The same in all processes, which must all call it."""
        if self._alone:
            return asked
        flag = torch.tensor(float(asked))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return flag.item() > 0


def _tell(message: str) -> None:
    """Past `sys.stderr`, which the signal may have interrupted in its own writing."""
    try:
        os.write(sys.stderr.fileno(), f"\n{message}\n".encode())
    except (AttributeError, OSError, ValueError):  # there is none
        pass
