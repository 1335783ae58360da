import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While it is entered, the first SIGINT (Ctrl-C) or SIGTERM only sets `asked`; a second one ends the process."""

    def __init__(self):
        self.asked = False
        self._before = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        self.asked = True
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        print("\nstopping behind this step, and saving; once more to end at once", file=sys.stderr, flush=True)
