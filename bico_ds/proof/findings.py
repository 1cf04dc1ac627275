"""What a measuring tool found: the JSON object in the last line of its output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What one part of the proof found.

    `rows`: comparisons, each with `name`, `ours`, `other`, `unit` and `ratio`. `tables`: each with `title`, `columns` and
    `rows` of cells. `wrong`: what is not as it must be; `notes`: what is worth knowing. `steps`: whole training steps.
    `not_measured`: why nothing could be measured on this machine, which is no failure; else empty. `left_out`: without
    what, for want of time, the part's question is not answered.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    not_measured: str = ""
    left_out: list[str] = field(default_factory=list)

    def as_line(self) -> str:
        """The tool's last line."""
        return json.dumps(asdict(self))


def read_findings(lines: Iterable[str]) -> Findings | None:
    """The findings in the last line that holds any of their form (libraries may warn after it); None where no line does."""
    known = {item.name for item in fields(Findings)}
    for found in reversed(list(_objects(lines))):
        if _is_findings(found):
            return Findings(**{key: value for key, value in found.items() if key in known})
    return None


def read_steps(lines: Iterable[str]) -> Findings:
    """The whole steps in the output of a tool that came to no end: it prints each as it comes, a JSON object on a line."""
    return Findings(steps=[found for found in _objects(lines) if _is_step(found)])


def _is_findings(found: dict[str, Any]) -> bool:
    """Whether the report can be made of it: what a tool writes is not to end the whole proof."""
    text: Callable[[Any], bool] = lambda item: isinstance(item, str)  # noqa: E731
    kinds = {
        "rows": _is_row,
        "tables": _is_table,
        "steps": _is_step,
        "wrong": text,
        "notes": text,
        "left_out": text,
    }
    lists = all(isinstance(found.get(key, []), list) for key in kinds)
    return (
        "rows" in found
        and lists
        and all(fits(item) for key, fits in kinds.items() for item in found.get(key, []))
        and isinstance(found.get("not_measured", ""), str)
    )


def _is_row(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and all(isinstance(item.get(key), str) for key in ("name", "unit"))
        and all(_is_number(item.get(key)) for key in ("ours", "other", "ratio"))
    )


def _is_table(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("title"), str)
        and isinstance(item.get("columns"), list)
        and isinstance(item.get("rows"), list)
        and all(isinstance(row, list) for row in item["rows"])
    )


def _is_step(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("kind"), str)
        and all(_is_number(item.get(key)) for key in ("length", "ms"))
        and ("mfu" in item and (item["mfu"] is None or _is_number(item["mfu"])))
    )


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool)


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found
