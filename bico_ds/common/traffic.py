"""What an op of ours states on the meta device instead of computing: its launches, and the bytes that these move.

A launch is counted as reading each row that it needs once, and writing each result once: what must come from and go to
the GPU's memory if its caches serve every repeated read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Of one call of the op named `op`."""

    op: str
    launches: int
    bytes_read: int
    bytes_written: int


_counters: list[list[Traffic]] = []


@contextmanager
def counting_traffic() -> Iterator[list[Traffic]]:
    """The `Traffic` of every call of an op on the meta device within, in order.

    A step of a whole model on the meta device says so what it costs.
    """
    calls: list[Traffic] = []
    _counters.append(calls)
    try:
        yield calls
    finally:
        _counters.remove(calls)


def report(traffic: Traffic) -> None:
    """Add a call to every counter that is active."""
    for calls in _counters:
        calls.append(traffic)
