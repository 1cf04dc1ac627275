"""Waiting for what another thread or process does, which a busy machine may do late."""

from __future__ import annotations

import time
from collections.abc import Callable


def waited(find: Callable[[], object], seconds: float = 60, *, pause: float = 0.2) -> object:
    """What `find` finds, as soon as it finds something; it is asked every `pause` seconds. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < end
        time.sleep(pause)
    return found
