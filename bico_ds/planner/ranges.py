"""A number that is known within bounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """`low` ≤ the true number ≤ `high`, as far as the planner's model goes."""

    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Range:
        """A number without bounds around it."""
        return cls(value, value)

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Range:
        """Both bounds times a factor of at least 0."""
        return Range(self.low * factor, self.high * factor)

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2
