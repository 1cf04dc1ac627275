"""Bytes with a name, within bounds, and where the formula comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from bico_ds.planner.ranges import Range


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of a table of memory or disk; `how`: the formula in words, or its source.

    `is_tensor`: whether an allocator of tensors counts it, as it does not count a driver's context or its own margin.
    """

    name: str
    bytes: Range
    how: str = ""
    is_tensor: bool = True


def total(items: Iterable[Item]) -> Range:
    """The sum of all items' bytes."""
    return reduce(Range.__add__, (item.bytes for item in items), Range.exactly(0))


def of_tensors(items: Iterable[Item]) -> Range:
    """The sum of the bytes that an allocator of tensors counts."""
    return total(item for item in items if item.is_tensor)
