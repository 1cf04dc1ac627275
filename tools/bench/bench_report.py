"""What a measuring tool found: shown as it comes, and at the end one JSON object that `bico-ds gpu-proof` renders."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(kw_only=True)
class Report:
    """`rows` compare ours with another, `tables` are rendered as they are, `wrong` fails the tool, `notes` do not."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.wrong else 0

    def add_row(self, name: str, ours: float, other: float, unit: str) -> None:
        """Ours beside another; the ratio is ours / other."""
        ratio = round(ours / other, 3)
        self.rows.append({"name": name, "ours": ours, "other": other, "unit": unit, "ratio": ratio})
        print(f"{name}: {ours:,} / {other:,} {unit} = {ratio}", flush=True)

    def add_table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        self.tables.append({"title": title, "columns": columns, "rows": rows})
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

    def to_json(self) -> str:
        return json.dumps(asdict(self))
