"""Numbers as a reader wants them: three digits, a unit, and one number where both bounds read alike."""

from __future__ import annotations

from bico_ds.planner.ranges import Range

GIB = 2**30
_TIMES = (("days", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def number(value: float) -> str:
    """Three digits, with commas from 1,000 on."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.{1 if abs(value) >= 10 else 2}f}"


def span(found: Range, *, unit: float = 1.0) -> str:
    """`LOW to HIGH` in units of `unit`; one number where both read alike."""
    low, high = number(found.low / unit), number(found.high / unit)
    return low if low == high else f"{low} to {high}"


def gib(found: Range) -> str:
    """Bytes in GiB, as torch and `nvidia-smi` count memory; without the unit."""
    return span(found, unit=GIB)


def stored(found: Range) -> str:
    """Bytes on a disk, in GB or TB of the decimal system."""
    unit, name = (1e12, "TB") if found.high >= 1e12 else (1e9, "GB")
    return f"{span(found, unit=unit)} {name}"


def percent(found: Range) -> str:
    return f"{span(found, unit=0.01)} %"


def time(found: Range) -> str:
    """Seconds in the largest unit of which the upper bound has at least two."""
    name, unit = next((entry for entry in _TIMES if found.high >= 2 * entry[1]), _TIMES[-1])
    return f"{span(found, unit=unit)} {name}"
