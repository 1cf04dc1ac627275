"""Names in logs that are unique within a run."""

from __future__ import annotations

from collections.abc import Iterable


def unique_names(wanted: Iterable[str]) -> list[str]:
    """Return the wanted names in order, all different: one that is taken gets the first free number (`x`, `x_2`, …)."""
    names: dict[str, None] = {}
    numbers: dict[str, int] = {}  # of a name the last that was given: a lower one is never free again
    for name in wanted:
        unique = name
        while unique in names:
            numbers[name] = numbers.get(name, 1) + 1
            unique = f"{name}_{numbers[name]}"
        names[unique] = None
    return list(names)
