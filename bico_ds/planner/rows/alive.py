"""Tensors that are made and freed one after the other: what is alive, and what was when they took the most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bico_ds.planner.rows.kept import KeptTensor


class Alive:
    """`tensors`: bytes by name; `peak`: `tensors` when their sum was the largest. `rows`: of the micro-batch."""

    def __init__(self, rows: float) -> None:
        self.rows = rows
        self.tensors: dict[str, float] = {}
        self.peak: dict[str, float] = {}

    def make(self, per_row: Mapping[str, float], *, rows: float | None = None) -> None:
        """Tensors at once, by bytes per row; `rows`: other ones than the micro-batch's."""
        count = self.rows if rows is None else rows
        self.tensors |= {name: count * size for name, size in per_row.items()}
        if sum(self.tensors.values()) > sum(self.peak.values()):
            self.peak = dict(self.tensors)

    def keep(self, tensors: Iterable[KeptTensor]) -> None:
        """Tensors of a layer that the backward pass has yet to read."""
        self.make({tensor.name: tensor.bytes for tensor in tensors})

    def free(self, *names: str) -> None:
        """Those of these names that there are."""
        for name in names:
            self.tensors.pop(name, None)

    def only(self, name: str) -> None:
        """Free all others."""
        self.tensors = {name: self.tensors[name]}
