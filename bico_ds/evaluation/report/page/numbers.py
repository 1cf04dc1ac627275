"""Numbers as a reader takes them: per cent, seconds, bytes, counts."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """A share of 0 … 1 in per cent; nothing that is not quite all, or none, is shown as that."""
    shown = f"{100 * share:.0f}"
    if shown in ("0", "100") and 0 < share < 1:
        shown = f"{100 * share:.1f}"
        shown = {"0.0": "under 0.1", "100.0": "over 99.9"}.get(shown, shown)
    return f"{shown} %"


def percent_range(low: float, high: float) -> str:
    """An interval of shares, as `92 to 100`."""
    return f"{100 * low:.0f} to {100 * high:.0f}"


def compact(value: float) -> str:
    """A number in three digits, as `1,234`, `12.3 k`, `4.56 M`, `0.0123`."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{_digits(value / (1e3 if name == 'k' else unit))} {name}"
    return f"{value:,.0f}" if size >= 1000 else _digits(value)


def tick(value: float) -> str:
    """A number beside an axis, with little room: `5 k`."""
    return f"{_digits(value / 1e3)} k" if 1e3 <= abs(value) < 1e6 else compact(value)


def _digits(value: float) -> str:
    """Three digits that count, and no exponent where few zeros do."""
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    whole = max(0, math.floor(math.log10(abs(value))) + 1)
    shown = f"{value:,.{max(0, 3 - whole) if abs(value) >= 1 else 2 - math.floor(math.log10(abs(value)))}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def seconds(value: float) -> str:
    """A time, as `68.6 ms`, `1.24 s`, `2.1 min`, `3.4 h`."""
    if 0 < value < 0.1:
        return f"{_digits(value * 1e3)} ms"
    if value < 100:
        return f"{compact(value)} s"
    return f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:,.1f} h"


def gigabytes(value: float) -> str:
    """Bytes in GB of 1e9, or MB of 1e6."""
    return (
        f"{_digits(value / 1e6)} MB" if 0 < value < 1e9 else f"{_digits(value / 1e9)} GB" if value else "0 GB"
    )


def amount(count: int, one: str) -> str:
    """A count with its noun, as `1 run`, `2 runs`."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


def in_words(names: list[str]) -> str:
    """Names in a sentence, as `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
