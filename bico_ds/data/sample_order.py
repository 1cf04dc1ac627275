"""The global sample order: which bins step s takes, whoever builds them; and the state that says where it
stands.

Objectives that expand documents alike share one stream of bins and one cursor into it. Where the cursors
stand at step s follows from where they stood at the first step and from the schedule: nothing is counted
while workers run ahead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bico_ds.config.errors import UserError
from bico_ds.config.schema import DataSpec
from bico_ds.data import identity
from bico_ds.data.mixture import Mixture
from bico_ds.data.rows import CutReport, Rows, cut, longest_row
from bico_ds.data.store import TokenStore
from bico_ds.data.stream import BinStream, Position, StreamBins
from bico_ds.objectives.base import Objective
from bico_ds.objectives.schedule import ObjectiveSchedule

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """One data epoch of one stream of bins. `fill` is the share of the bins' room that is taken."""

    objectives: tuple[str, ...]
    bins: int
    rows: int
    tokens: int
    fill: float
    most_rows_in_a_bin: int
    passes: dict[str, float]  # over each source
    cut: dict[str, CutReport]  # what became of each source's documents


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """What all ranks together do in one step."""

    objective: Objective
    rows: Sequence[Rows]  # of each source
    bins: StreamBins


@dataclass(frozen=True, kw_only=True)
class _Cursor:
    """A stream of bins, the rows it is made of, and where it stands at the first step."""

    objectives: tuple[Objective, ...]
    stream: BinStream
    rows: Sequence[Rows]
    mixture: Mixture
    start: Position


class SampleOrder:
    """A pure function of (stores, data, schedule, seed, global batch, starting state); safe to use from
    threads.

    `changes` lists what differs from the state, which `data.allow_change` lets pass.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        data: DataSpec,
        schedule: ObjectiveSchedule,
        *,
        seed: int,
        global_batch_bins: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.source_names = identity.source_names(data.sources)
        self._schedule, self._global_batch_bins = schedule, global_batch_bins
        self._identity = identity.identity(
            data,
            [store.fingerprint for store in stores],
            schedule,
            seed=seed,
            global_batch_bins=global_batch_bins,
        )
        if state and state["version"] != STATE_VERSION:
            raise UserError(
                f"the checkpoint's loader state has version {state['version']}, this program reads "
                f"{STATE_VERSION}: resume with the program that wrote it"
            )
        self.changes = identity.changes(state["identity"], self._identity) if state else []
        if self.changes and not data.allow_change:
            identity.refuse(self.changes)
        self.start_step = int(state["step"]) if state else 0
        self._cursors, self._cursor_of = self._make_cursors(stores, data, seed, state)
        self._totals = (self.start_step, _saved_totals(state, self.source_names))
        self._counts: dict[int, NDArray[np.int64]] = {}  # of steps taken, until `source_totals` adds them up

    def batch(self, step: int) -> GlobalBatch:
        """Return the global batch of a step."""
        if step < self.start_step:
            raise ValueError(f"step {step} lies before the first step, {self.start_step}")
        index = int(self._schedule.indices(step, step + 1)[0])
        number = int(self._cursor_of[index])
        cursor = self._cursors[number]
        bins = cursor.stream.take(self._positions(step)[number], self._global_batch_bins)
        self._counts[step] = _count_by_source(bins, len(self.source_names))
        return GlobalBatch(objective=self._schedule.objectives[index], rows=cursor.rows, bins=bins)

    def total_steps(self, epochs: float) -> int:
        """Return the optimizer steps of so many data epochs: bins seen over bins there are, rounded up."""
        streams = [self._cursors[number].stream for number in self._cursor_of]
        epochs_per_bin = sum(
            p / stream.num_bins(0) for p, stream in zip(self._schedule.probabilities, streams, strict=True)
        )
        return max(1, math.ceil(epochs / (self._global_batch_bins * epochs_per_bin) - 1e-9))

    def state_dict(self, next_step: int) -> dict[str, Any]:
        """Return what another `SampleOrder` needs to go on at `next_step`; JSON-able."""
        cursors = []
        for cursor, position in zip(self._cursors, self._positions(next_step), strict=True):
            plan = cursor.stream.plan(position.epoch).fingerprint
            cursors.append({"epoch": position.epoch, "bins_consumed": position.bin, "plan": plan})
        return {
            "version": STATE_VERSION,
            "step": next_step,
            "cursors": cursors,
            "sources": self.source_totals(next_step),
            "identity": self._identity,
            "fingerprint": identity.fingerprint(self._identity),
        }

    def source_totals(self, next_step: int) -> dict[str, dict[str, int]]:
        """Return, by source, the rows and tokens (as objectives expand them) that all ranks consume before
        `next_step`, since step 0; to be asked in rising order."""
        known, totals = self._totals
        if next_step < known:
            raise ValueError(f"the totals of step {known} were asked for: those of step {next_step} are gone")
        for step in range(known, next_step):
            if step not in self._counts:
                self.batch(step)
            totals = totals + self._counts.pop(step)
        self._totals = (next_step, totals)
        pairs = zip(self.source_names, totals.tolist(), strict=True)
        return {name: {"rows": rows, "tokens": tokens} for name, (rows, tokens) in pairs}

    def report(self) -> list[StreamReport]:
        """Describe the first data epoch of each stream, for people."""
        reports = []
        for cursor in self._cursors:
            plan, lengths = cursor.stream.plan(0), cursor.stream.epoch_lengths(0)
            reports.append(
                StreamReport(
                    objectives=tuple(objective.name for objective in cursor.objectives),
                    bins=plan.num_bins,
                    rows=len(lengths),
                    tokens=int(lengths.sum()),
                    fill=float(lengths.sum() / (plan.num_bins * plan.capacity)),
                    most_rows_in_a_bin=int(np.diff(plan.bin_offsets).max()),
                    passes=dict(zip(self.source_names, cursor.mixture.passes, strict=True)),
                    cut={n: rows.report for n, rows in zip(self.source_names, cursor.rows, strict=True)},
                )
            )
        return reports

    def _make_cursors(
        self, stores: Sequence[TokenStore], data: DataSpec, seed: int, state: Mapping[str, Any] | None
    ) -> tuple[list[_Cursor], NDArray[np.int64]]:
        lengths = np.arange(1, data.capacity + 1)
        expansions = [objective.expand(lengths).tobytes() for objective in self._schedule.objectives]
        distinct = list(dict.fromkeys(expansions))
        cursor_of = np.array([distinct.index(expansion) for expansion in expansions])
        cursors = []
        for number in range(len(distinct)):
            members = tuple(self._schedule.objectives[i] for i in np.flatnonzero(cursor_of == number))
            longest = longest_row(members[0].expand, data.capacity)
            rows = [self._cut(index, store, longest, data) for index, store in enumerate(stores)]
            mixture = Mixture.of(data.sources, [len(part) for part in rows], seed)
            stream = BinStream(rows, mixture, members[0].expand, data, seed=seed)
            start = _start(state, number, stream, allow_change=data.allow_change)
            cursors.append(
                _Cursor(objectives=members, stream=stream, rows=rows, mixture=mixture, start=start)
            )
        return cursors, cursor_of

    def _cut(self, index: int, store: TokenStore, longest: int, data: DataSpec) -> Rows:
        bos_id = store.manifest.bos_id if store.manifest.add_bos else None
        rows = cut(store.lengths, longest=longest, overlong=data.overlong, bos_id=bos_id)
        if len(rows) == 0:
            raise UserError(
                f"source '{self.source_names[index]}' has nothing to train on: of its {len(store)} documents "
                f"none has 1 … {longest} tokens (data.capacity with data.overlong: {data.overlong})"
            )
        return rows

    def _positions(self, step: int) -> list[Position]:
        steps = np.array([step - self.start_step])
        if len(self._cursors) > 1:
            drawn = self._cursor_of[self._schedule.indices(self.start_step, step)]
            steps = np.bincount(drawn, minlength=len(self._cursors))
        bins = steps * self._global_batch_bins
        return [c.stream.advance(c.start, n) for c, n in zip(self._cursors, bins.tolist(), strict=True)]


def _count_by_source(bins: StreamBins, sources: int) -> NDArray[np.int64]:
    """Return rows and tokens, int64 [sources, 2]."""
    columns = [np.bincount(bins.source, weights, minlength=sources) for weights in (None, bins.length)]
    return np.stack(columns, axis=1).astype(np.int64)


def _start(
    state: Mapping[str, Any] | None, number: int, stream: BinStream, *, allow_change: bool
) -> Position:
    """Where a stream stands at the first step. A changed one goes on at the same epoch and bin, where they
    exist.
    """
    if state is None or number >= len(state["cursors"]):
        return Position()
    saved = state["cursors"][number]
    epoch, bins = int(saved["epoch"]), int(saved["bins_consumed"])
    if not allow_change and stream.plan(epoch).fingerprint != saved["plan"]:
        identity.refuse(["the pack plan: same data and recipe, but this version packs them otherwise"])
    return stream.advance(Position(epoch=epoch, bin=min(bins, stream.num_bins(epoch))), 0)


def _saved_totals(state: Mapping[str, Any] | None, names: Sequence[str]) -> NDArray[np.int64]:
    saved = state["sources"] if state else {}
    rows = [[saved[name]["rows"], saved[name]["tokens"]] if name in saved else [0, 0] for name in names]
    return np.array(rows, dtype=np.int64)
