"""Bounds of CPU time for what must not take long, whatever it is given."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cpu_seconds_below(most: float, what: object = "") -> Iterator[None]:
    """What is done in this block takes fewer seconds of a CPU.

    To collect what else the tests' process holds takes a second by itself, and is left out.
    """
    gc.freeze()
    started = time.process_time()
    try:
        yield
    finally:
        taken = time.process_time() - started
        gc.unfreeze()
    assert taken < most, what
