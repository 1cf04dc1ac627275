"""Names in logs that are unique within a run."""

from __future__ import annotations

from collections.abc import Iterable


def unique_names(wanted: Iterable[str]) -> list[str]:
    """Return the wanted names in order, all different: one that is taken gets the first free number (`x`, `x_2`, …)."""
    names: list[str] = []
    for name in wanted:
        unique, number = name, 1
        while unique in names:
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names
