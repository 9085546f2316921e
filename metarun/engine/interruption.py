"""A signal that ends a training after its checkpoint is saved."""

from __future__ import annotations

import signal
import threading
from typing import Any

from metarun.system.platform import heeded_signals, signal_name


class Interrupted(KeyboardInterrupt):
    """A signal ended training after the checkpoint was saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal_name(number)} at step {step}")
        self.number = number


class Signals:
    """Notes a signal instead of dying of it, while it is entered; a second SIGINT interrupts at once.

    A thread that is not the main one gets none, and notes none.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Signals:
        heeded = (signal.SIGINT, *heeded_signals()) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
