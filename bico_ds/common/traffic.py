"""What an op of ours states on the meta device instead of computing: its launches, and the bytes that these move.

A launch is counted as reading each row that it needs once, and writing each result once: what must come from and go to
the GPU's memory if its caches serve every repeated read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Of one call of the op named `op`."""

    op: str
    launches: int
    bytes_read: int
    bytes_written: int


_listeners: list[Callable[[Traffic], None]] = []


@contextmanager
def hearing_traffic(listener: Callable[[Traffic], None]) -> Iterator[None]:
    """`listener` is given the `Traffic` of every call of an op on the meta device within, when it is called."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def counting_traffic() -> Iterator[list[Traffic]]:
    """The `Traffic` of every call of an op on the meta device within, in order.

    A step of a whole model on the meta device says so what it costs.
    """
    calls: list[Traffic] = []
    with hearing_traffic(calls.append):
        yield calls


def report(traffic: Traffic) -> None:
    """Give a call to every listener."""
    for listener in _listeners:
        listener(traffic)
