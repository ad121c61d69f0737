"""Ctrl-C and SIGTERM, taken note of and acted on where training can be left."""

from __future__ import annotations

import os
import signal
import threading

from rlvd_jax import hosts


class Stopped(Exception):
    """Raised by `Interruption.check` after a signal: save what there is, then call `Interruption.leave`."""


class Interruption:
    """While the context is open the first SIGINT or SIGTERM is only noted, and `check()` raises `Stopped`. A second
    SIGINT raises KeyboardInterrupt at once. A signal that came too late for a `check()` is acted on when the context
    closes. Outside the main thread, which alone gets signals, it does nothing.

    Where a study runs on several hosts, all of them stop if one is told to: `agree()` is called by all together, and
    raises `Stopped` in all or in none. `check()` is for what each does by itself; `agree()` comes after it."""

    def __init__(self):
        self.signal: int | None = None
        self._before = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._share()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.signal is not None:
            self.leave()

    def _note(self, number, _frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        hosts.tell_stop()
        # Not print: the signal may have come in the middle of another write to the same buffer.
        os.write(2, b"\nstopping: saving a checkpoint; the same command goes on from it\n")

    def check(self) -> None:
        """Raise `Stopped` if a signal came, here or to another host. To be called where what the caller holds can be
        saved."""
        if self.signal is not None or hosts.stop_told():
            raise Stopped

    def agree(self) -> None:
        """Raise `Stopped` in all processes if a signal came to any."""
        self._share()
        if self.signal is not None:
            raise Stopped

    def _share(self) -> None:
        self.signal = hosts.largest(self.signal or 0) or None

    def leave(self) -> None:
        """Raise what the signal stands for: KeyboardInterrupt, or SystemExit with status 128 + its number."""
        raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)
