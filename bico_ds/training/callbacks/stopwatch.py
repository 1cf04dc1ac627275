"""How long something takes that is done again and again."""

from __future__ import annotations

import time


class Stopwatch:
    """Adds up the wall time of the blocks that it is around, one at a time."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """The seconds of the blocks that ended since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken
