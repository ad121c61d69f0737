"""Ctrl-C and SIGTERM, taken note of and acted on where training can be left."""

from __future__ import annotations

import signal
import sys
import threading


class Interruption:
    """While the context is open, the first SIGINT or SIGTERM is only noted, and `check()` raises for it:
    KeyboardInterrupt or SystemExit (128 + 15). A second SIGINT interrupts at once. Outside the main
    thread, which alone gets signals, it does nothing."""

    def __init__(self):
        self.signal: int | None = None
        self._before = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping: saving a checkpoint; the same command goes on from it", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise if a signal came."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)
