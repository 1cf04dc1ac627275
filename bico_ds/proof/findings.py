"""What a measuring tool found: shown as it comes, and at the end a JSON object, the last line of its output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(kw_only=True)
class Findings:
    """What one part of the proof found.

    `rows`: comparisons, each with `name`, `ours`, `other`, `unit` and `ratio`, which says how many times better ours is,
    whatever is compared: other / ours of times, ours / other of rates, whose unit ends with "/s". `tables`: each with
    `title`, `columns` and `rows` of cells. `wrong`: what is not as it must be; `notes`: what is worth knowing. `steps`:
    whole training steps. `not_measured`: why nothing could be measured on this machine, which is no failure; else empty.
    `left_out`: without what, for want of time, the part's question is not answered.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    not_measured: str = ""
    left_out: list[str] = field(default_factory=list)

    def add_row(self, name: str, ours: float, other: float, unit: str) -> None:
        """Ours beside another: times, or rates per second; both above 0."""
        better = ours / other if unit.endswith("/s") else other / ours
        # By digits, not by places: ours may be a thousand times slower.
        ratio = float(f"{better:.6g}")
        self.rows.append({"name": name, "ours": ours, "other": other, "unit": unit, "ratio": ratio})
        print(f"{name}: {ours:,} and {other:,} {unit}, {ratio:,.4g} times as fast", flush=True)

    def add_table(self, title: str, columns: list[str], rows: Sequence[list[Any]]) -> None:
        """A table; none where it would be empty."""
        if not rows:
            return
        self.tables.append({"title": title, "columns": columns, "rows": list(rows)})
        shown = Table(*columns, title=title, title_justify="left")
        for row in rows:
            shown.add_row(*("" if cell is None else str(cell) for cell in row))
        Console(soft_wrap=True, width=200).print(shown)

    def add_wrong(self, text: str) -> None:
        self.wrong.append(text)
        print(f"WRONG: {text}", flush=True)

    def add_note(self, text: str) -> None:
        self.notes.append(text)
        print(f"note: {text}", flush=True)

    def add_step(self, figures: dict[str, Any]) -> None:
        self.steps.append(figures)
        print(json.dumps(figures), flush=True)

    def finish(self, *, as_json: bool) -> int:
        """Print the last line, if it is asked for; returns the tool's exit code."""
        if as_json:
            print(self.as_line(), flush=True)
        return 1 if self.wrong else 0

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
        and (item.get("memory_off") is None or _is_number(item["memory_off"]))
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
