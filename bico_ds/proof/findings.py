"""What a measuring tool found: the JSON object in the last line of its output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
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
    """The findings in the last line that holds any (libraries may warn after it); None where no line does."""
    known = {item.name for item in fields(Findings)}
    for found in reversed(list(_objects(lines))):
        if isinstance(found.get("rows"), list):
            return Findings(**{key: value for key, value in found.items() if key in known})
    return None


def read_steps(lines: Iterable[str]) -> Findings:
    """The whole steps in the output of a tool that came to no end: it prints each as it comes, a JSON object on a line."""
    return Findings(
        steps=[found for found in _objects(lines) if {"kind", "length", "ms", "mfu"} <= set(found)]
    )


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
