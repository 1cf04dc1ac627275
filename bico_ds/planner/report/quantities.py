"""Numbers as a reader wants them: three digits, a unit, and one number where both bounds read alike."""

from __future__ import annotations

from bico_ds.planner.ranges import Range

GIB = 2**30
GB = 1e9
_TIMES = (("days", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))
_STORED = (("TB", 1e12), ("GB", GB), ("MB", 1e6))


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


def stored(size: float) -> str:
    """Bytes on a disk or a link, in TB, GB or MB of the decimal system."""
    name, unit = next((entry for entry in _STORED if size >= entry[1]), _STORED[-1])
    return f"{number(size / unit)} {name}"


def percent(found: Range) -> str:
    return f"{span(found, unit=0.01)} %"


def time(found: Range) -> str:
    """Seconds in the largest unit of which the upper bound has at least one."""
    name, unit = next((entry for entry in _TIMES if found.high >= entry[1]), _TIMES[-1])
    return f"{span(found, unit=unit)} {name}"
