"""Signals set a flag; every loop polls it. No torch here: handlers are installed before the heavy imports."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType


class StopFlag:
    """Set by a signal or a time limit. The second signal ends the process at once; the last checkpoint is whole."""

    def __init__(self) -> None:
        self.reason = ""
        self._finished = False

    def __bool__(self) -> bool:
        return bool(self.reason)

    def install(self, names: Iterable[str]) -> None:
        """Handle these signals from now on (main thread only)."""
        for name in names:
            signal.signal(getattr(signal, name), self._on_signal)

    def limit(self, minutes: float) -> None:
        """Set the flag after so many minutes of wall-clock time."""
        timer = threading.Timer(minutes * 60, self.set, (f"time limit of {minutes:g} minutes",))
        timer.daemon = True
        timer.start()

    def set(self, reason: str) -> None:
        self.reason = self.reason or reason

    def finish(self) -> None:
        """The work is done: a signal that comes now must not turn success into failure."""
        self._finished = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._finished:
            return
        if self.reason and number in (signal.SIGINT, signal.SIGTERM):
            os._exit(128 + number)
        self.set(signal.Signals(number).name)
