"""Signals set a flag; every loop polls it. No torch here: handlers are installed before the heavy imports."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from types import FrameType

# Ctrl-C reaches launcher and ranks; DeepSpeed's launcher then sends SIGTERM to one rank after the other, and gives
# each 30 seconds. That is the same request again, not a second one.
ECHO_SECONDS = 40.0


class Interrupted(BaseException):
    """A stop was asked for in a phase that has nothing to save. Not an `Exception`: no library may swallow it."""


class StopFlag:
    """Set by a signal or a time limit. The same signal again ends the process at once (128 + its number), as another one
    does after `ECHO_SECONDS`; the last checkpoint is complete. A terminal that closes may say so twice: SIGHUP counts once.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._first: tuple[int, float] | None = None
        self._finished = False
        self._interrupts = False
        self._arrived: int | None = None
        self._hung_up = False

    def __bool__(self) -> bool:
        return bool(self.reason)

    def install(self, names: Iterable[str]) -> None:
        """Handle these signals and a closed terminal's SIGHUP from now on (main thread only)."""
        for name in names:
            signal.signal(getattr(signal, name), self._on_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under `nohup`
            signal.signal(signal.SIGHUP, self._on_signal)
        self._arrived, told = os.pipe()
        for end in (self._arrived, told):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def is_hung_up(self) -> bool:
        """Whether SIGHUP has come, even if its handler has not: the main thread may be in a backward pass for seconds.

        For one other thread, which asks in turn.
        """
        if self._arrived is not None:
            with contextlib.suppress(BlockingIOError):
                self._hung_up |= signal.SIGHUP in os.read(self._arrived, 1 << 16)
        return self._hung_up

    def limit(self, minutes: float) -> None:
        """Set the flag after so many minutes of wall-clock time (main thread only)."""
        signal.signal(signal.SIGALRM, lambda number, frame: self._ask(f"time limit of {minutes:g} minutes"))
        signal.setitimer(signal.ITIMER_REAL, minutes * 60)

    def set(self, reason: str) -> None:
        """Ask for a stop, from any thread; the first reason counts."""
        self.reason = self.reason or reason

    def finish(self) -> None:
        """The work is done, or saved: a signal that comes now must not turn success into failure."""
        self._finished = True

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within this block a signal raises `Interrupted` (main thread only): for start-up, which has nothing to save."""
        if self:
            raise Interrupted(self.reason)
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._finished:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (number, now)
        elif (number == self._first[0] != signal.SIGHUP) or now - self._first[1] > ECHO_SECONDS:
            os._exit(128 + number)
        self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        """In the main thread, where an exception can be raised."""
        self.set(reason)
        if self._interrupts:
            self._interrupts = False
            raise Interrupted(self.reason)
