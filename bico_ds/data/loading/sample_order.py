"""The global sample order: which bins a step takes on all ranks together, and the state that a checkpoint keeps of it.

Objectives that expand documents alike, and draw from the same sources, share one stream of bins and one cursor into it.
Where the cursors stand at step s follows from where they stood at the first step and from the schedule: nothing is
counted while workers run ahead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.config.section import STEPS
from bico_ds.config.sections.data import DataSpec
from bico_ds.config.sections.retention import RetentionSpec
from bico_ds.data.loading import identity
from bico_ds.data.loading.draws import numbers_of_draws, seed_of_draws
from bico_ds.data.loading.global_batch import Built, GlobalBatch
from bico_ds.data.loading.legacy_identity import translate_state
from bico_ds.data.loading.mixture import Mixture
from bico_ds.data.loading.sequences import CutReport, Sequences, cut_store, longest_sequence
from bico_ds.data.loading.stream import BinStream, Position, StreamBins
from bico_ds.data.store import TokenStore
from bico_ds.data.teacher.stored import StoredTeacher
from bico_ds.objectives.base import Objective
from bico_ds.objectives.schedule import ObjectiveSchedule
from bico_ds.planner.compute.shares import Counted, StepShares
from bico_ds.planner.workload import Drawn

STATE_VERSION = 2
# Masks of so many tokens have their mean rate within a fraction of a per cent; so many fit into a batch to be counted.
_COUNTED_TOKENS, _TOKENS_PER_COUNT = 1 << 18, 1 << 15


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """One data epoch of one stream of bins.

    `fill` is the fraction of the bins' room that is taken; `longest` the room that the longest sequence takes, in tokens.
    """

    objectives: tuple[str, ...]
    bins: int
    sequences: int
    tokens: int
    longest: int
    fill: float
    most_sequences_per_bin: int
    # Over each source, and its share of the tokens.
    passes: dict[str, float]
    shares: dict[str, float]
    # What became of each source's documents.
    cut: dict[str, CutReport]


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """All that the global sample stream is a function of.

    `stores` are those of `data.sources`, in order. `sources_of`: the numbers of the sources that each objective draws from,
    in the schedule's order; None: each from all. `retention`: which rows are compared with the start model; None:
    none. `teachers`: its stored distributions over a source's texts, by the source's number. `vocabulary`: the number of ids
    that the model embeds, which bounds what a batch may hold. `draws`: the number of each objective's draws: those of one
    number draw alike, and 0 (None: all are) draws by the run's seed itself. `shares`: finds the probabilities of the steps
    where the schedule's are shares of something else; None: they are of steps.
    """

    stores: Sequence[TokenStore]
    data: DataSpec
    schedule: ObjectiveSchedule
    seed: int
    global_batch_bins: int
    vocabulary: int
    sources_of: Sequence[Sequence[int]] | None = None
    retention: RetentionSpec | None = None
    teachers: Mapping[int, StoredTeacher] = field(default_factory=dict)
    draws: Sequence[int] | None = None
    shares: StepShares | None = None

    def sources(self, objective: int) -> tuple[int, ...]:
        """The numbers of the sources that the objective of this number draws from."""
        everything = range(len(self.stores))
        return tuple(everything if self.sources_of is None else self.sources_of[objective])


@dataclass(frozen=True, kw_only=True)
class Consumed:
    """What all ranks together have consumed since step 0.

    `counts` int64 [sources, 2]: the sequences and the tokens (as objectives expand them) of each source.
    """

    sources: tuple[str, ...]
    counts: NDArray[np.int64]

    def plus(self, counts: NDArray[np.int64]) -> Consumed:
        """Return the sum with the counts of one more step."""
        return replace(self, counts=self.counts + counts)

    def by_source(self) -> dict[str, dict[str, int]]:
        """Return `{source: {"rows", "tokens"}}`, JSON-able; `rows` is the format's key for sequences."""
        pairs = zip(self.sources, self.counts.tolist(), strict=True)
        return {name: {"rows": sequences, "tokens": tokens} for name, (sequences, tokens) in pairs}


@dataclass(frozen=True, kw_only=True)
class _Cursor:
    """A stream of bins, the sequences of all sources, the objectives that take from it, and the sources it draws from."""

    objectives: tuple[Objective, ...]
    stream: BinStream
    sequences: list[Sequences]
    mixture: Mixture
    # Their numbers.
    sources: tuple[int, ...]


class SampleOrder:
    """Which bins a step takes: a pure function of (`spec`, starting state), safe to use from threads.

    `start_step` and `start_consumed` are the state's, else zero. `schedule`: the spec's, by the probabilities of steps;
    these are the state's while nothing changes, else what the spec's `shares` finds. `changes` lists what differs from the
    state where `data.allow_change` permits that. Raises `UserError` for a source with nothing to train on, a capacity or
    mixture that leaves nothing, and for the state of another data set, recipe or version.
    """

    def __init__(self, spec: StreamSpec, state: Mapping[str, Any] | None = None) -> None:
        self._spec = spec
        self.source_names = spec.data.source_names
        state = _current_version(state) if state else None
        self._draws = numbers_of_draws(
            spec.schedule.objectives, spec.draws, state["identity"] if state else None
        )
        self._identity = identity.identity(
            spec.data,
            [store.fingerprint for store in spec.stores],
            spec.schedule,
            sources_of=[spec.sources(number) for number in range(len(spec.schedule.objectives))],
            seed=spec.seed,
            global_batch_bins=spec.global_batch_bins,
            teachers={source: teacher.manifest.fingerprint for source, teacher in spec.teachers.items()},
            draws=self._draws,
            share_by=spec.shares.share_by if spec.shares else "steps",
            replies={
                source: spec.stores[source].manifest.replies_checksum
                for number, objective in enumerate(spec.schedule.objectives)
                if getattr(objective, "reads_replies", False)
                for source in spec.sources(number)
            },
        )
        self.changes = identity.changes(state["identity"], self._identity) if state else []
        if self.changes and not spec.data.allow_change:
            identity.refuse(self.changes)
        self.start_step = int(state["step"]) if state else 0
        self.start_consumed = _saved_counts(state, self.source_names)
        self._cursors, self._cursor_of = self._make_cursors()
        self.schedule = self._schedule_of_steps(state)
        self._starts = self._find_starts(state)

    def sequences_of(self, objective: int) -> list[Sequences]:
        """Return the sequences of each source that the objective of this number is trained on."""
        return self._cursors[int(self._cursor_of[objective])].sequences

    def drawn(self, objective: int) -> Drawn:
        """Return the sequences of the first data epoch that the objective of this number takes from."""
        cursor = self._cursors[int(self._cursor_of[objective])]
        lengths, sources = cursor.stream.sequence_lengths(0), cursor.stream.sequence_sources(0)
        bins = cursor.stream.num_bins(0)
        return Drawn(lengths=lengths, sources=sources, passes=cursor.mixture.passes, bins=bins)

    def batch(self, step: int) -> GlobalBatch:
        """Return the global batch of a step. Raises ValueError for one before `start_step`."""
        if step < self.start_step:
            raise ValueError(f"step {step} lies before the first step, {self.start_step}")
        index = int(self.schedule.indices(step, step + 1)[0])
        position = self._positions(step)[int(self._cursor_of[index])]
        return self._take(index, position, self._spec.global_batch_bins)

    def _take(self, index: int, position: Position, count: int) -> GlobalBatch:
        """The batch of `count` bins from this position on, for the objective of this number."""
        cursor = self._cursors[int(self._cursor_of[index])]
        bins = cursor.stream.take(position, count)
        return GlobalBatch(
            objective=self._spec.schedule.objectives[index],
            seed=seed_of_draws(self._spec.seed, self._draws[index]),
            sequences=cursor.sequences,
            bins=bins,
            counts=_count_by_source(bins, len(self.source_names)),
            fill=int(bins.length.sum()) / (count * self._spec.data.capacity),
        )

    def total_steps(self, epochs: float, *, source: int | None = None) -> int:
        """Return the optimizer steps until the epochs taken from all streams add up to `epochs`, rounded up, at least 1.

        With `source`, the passes over the source of this number count instead of data epochs: by the objectives of the
        steps that are drawn, where data epochs are counted by their probabilities.
        """
        cursors = [self._cursors[number] for number in self._cursor_of]
        per_step = self._spec.global_batch_bins * np.array(
            [
                (1.0 if source is None else cursor.mixture.passes[source]) / cursor.stream.num_bins(0)
                for cursor in cursors
            ]
        )
        expected = max(1, math.ceil(epochs / (per_step @ self.schedule.probabilities) - 1e-9))
        # No run has more, so nobody needs to know how many exactly.
        if source is None or STEPS.problem(expected) is not None:
            return expected
        return _steps_until(self.schedule, epochs, per_step)

    def state_dict(self, next_step: int, consumed: Consumed) -> dict[str, Any]:
        """Return what another `SampleOrder` needs to go on at `next_step`, JSON-able; `consumed` is what came before."""
        cursors = []
        for cursor, position in zip(self._cursors, self._positions(next_step), strict=True):
            plan = cursor.stream.plan(position.epoch).fingerprint
            cursors.append({"epoch": position.epoch, "bins_consumed": position.bin, "plan": plan})
        return {
            "version": STATE_VERSION,
            "step": next_step,
            "cursors": cursors,
            "cursor_of": self._cursor_of.tolist(),
            "sources": consumed.by_source(),
            "step_probabilities": list(self.schedule.probabilities),
            "identity": self._identity,
            "fingerprint": identity.fingerprint(self._identity),
        }

    def report(self) -> list[StreamReport]:
        """Describe the first data epoch of each stream."""
        reports = []
        for cursor in self._cursors:
            plan, lengths = cursor.stream.plan(0), cursor.stream.epoch_lengths(0)
            tokens = np.bincount(cursor.stream.sequence_sources(0), lengths, minlength=len(self.source_names))
            reports.append(
                StreamReport(
                    objectives=tuple(objective.name for objective in cursor.objectives),
                    bins=plan.num_bins,
                    sequences=len(lengths),
                    tokens=int(lengths.sum()),
                    longest=int(lengths.max()),
                    fill=float(lengths.sum() / (plan.num_bins * plan.capacity)),
                    most_sequences_per_bin=int(np.diff(plan.bin_offsets).max()),
                    passes={self.source_names[s]: cursor.mixture.passes[s] for s in cursor.sources},
                    shares={self.source_names[s]: tokens[s] / tokens.sum() for s in cursor.sources},
                    cut={self.source_names[s]: cursor.sequences[s].report for s in cursor.sources},
                )
            )
        return reports

    def _schedule_of_steps(self, state: Mapping[str, Any] | None) -> ObjectiveSchedule:
        given = self._spec.schedule
        if self._spec.shares is None:
            return given
        if state is not None and not self.changes:
            # Not found again: a later program may count otherwise.
            probabilities = state["step_probabilities"]
        else:
            drawn = [self.drawn(number) for number in range(len(given.objectives))]
            probabilities = self._spec.shares.probabilities(drawn, self._count)
        return ObjectiveSchedule(given.objectives, probabilities, self._spec.seed)

    def _count(self, objective: int) -> Counted:
        """What batches of the first bins of the objective of this number hold."""
        cursor, spec = self._cursors[int(self._cursor_of[objective])], self._spec
        bins = min(cursor.stream.num_bins(0), -(-_COUNTED_TOKENS // spec.data.capacity))
        parts = min(bins, -(-bins * spec.data.capacity // _TOKENS_PER_COUNT))
        batch, lengths, counts = self._take(objective, Position(), bins), [], np.zeros(3, np.int64)

        def build(entries: NDArray[np.int64]) -> Built:
            return batch.build(entries, spec.stores, vocabulary=spec.vocabulary)

        for chosen in np.array_split(np.arange(bins), parts):
            try:
                built = build(batch.entries(chosen))
            except Exception as error:
                raise batch.named(error, build, self.source_names) from error
            packed = built.packed
            counts += (len(packed.input_ids), len(packed.targets), packed.plan.num_pairs)
            lengths.append(built.documents.lengths)
        rows, targets, pairs = counts.tolist()
        return Counted(lengths=np.concatenate(lengths), rows=rows, targets=targets, pairs=pairs)

    def _make_cursors(self) -> tuple[list[_Cursor], NDArray[np.int64]]:
        """The cursors, and the number of each objective's."""
        data, objectives = self._spec.data, self._spec.schedule.objectives
        lengths = np.arange(1, data.capacity + 1)
        streams = [
            (_expanded(objective, lengths).tobytes(), self._spec.sources(number))
            for number, objective in enumerate(objectives)
        ]
        distinct = list(dict.fromkeys(streams))
        cursor_of = np.array([distinct.index(stream) for stream in streams])
        cursors = []
        for number, (_, sources) in enumerate(distinct):
            members = tuple(objectives[i] for i in np.flatnonzero(cursor_of == number))
            cursors.append(self._make_cursor(members, sources))
        return cursors, cursor_of

    def _make_cursor(self, objectives: tuple[Objective, ...], sources: tuple[int, ...]) -> _Cursor:
        """The cursor of objectives that expand documents alike and draw from these sources."""
        data, expand, seed = self._spec.data, objectives[0].expand, self._spec.seed
        longest = longest_sequence(expand, data.capacity)
        sequences = [cut_store(store, longest=longest, overlong=data.overlong) for store in self._spec.stores]
        for source in sources:
            self._require_some(source, sequences[source], longest)
        tokens = [int(expand(part.length.astype(np.int64)).sum()) if len(part) else 0 for part in sequences]
        counts = [len(part) for part in sequences]
        mixture = Mixture.of(data.sources, counts, tokens, seed, members=sources)
        return _Cursor(
            objectives=objectives,
            stream=BinStream(sequences, mixture, expand, data, seed=seed),
            sequences=sequences,
            mixture=mixture,
            sources=sources,
        )

    def _find_starts(self, state: Mapping[str, Any] | None) -> list[Position]:
        """Where each stream stands at the first step: where its saved cursor stood, if the bin exists."""
        if state is None:
            return [Position()] * len(self._cursors)
        saved, streams = state["cursors"], [cursor.stream for cursor in self._cursors]
        is_same = len(saved) == len(streams) and all(map(_same_plan, streams, saved))
        if not is_same and not self._spec.data.allow_change:
            identity.refuse(["the pack plan: same data and recipe, but this version packs them otherwise"])
        chosen = self._match(state) if self._spec.data.allow_change else range(len(streams))
        return [
            Position() if number is None else _position(stream, saved[number])
            for stream, number in zip(streams, chosen, strict=True)
        ]

    def _match(self, state: Mapping[str, Any]) -> list[int | None]:
        """The saved cursor of each stream, whatever their order: of an objective that both have, else of the same plan.

        A stream without one was changed, and takes the next cursor that no stream has; None: there is none left.
        """
        saved, streams = state["cursors"], [cursor.stream for cursor in self._cursors]
        theirs = _members(state["identity"], state.get("cursor_of", ()), len(saved))
        ours = _members(self._identity, self._cursor_of.tolist(), len(streams))
        chosen: list[int | None] = []
        for stream, objectives in zip(streams, ours, strict=True):
            shared = [n for n, members in enumerate(theirs) if any(o in members for o in objectives)]
            chosen.append(max(shared, key=lambda n: _same_plan(stream, saved[n]), default=None))
        for fits in (_same_plan, lambda stream, cursor: True):
            for index in (i for i, number in enumerate(chosen) if number is None):
                free = (n for n in range(len(saved)) if n not in chosen and fits(streams[index], saved[n]))
                chosen[index] = next(free, None)
        return chosen

    def _require_some(self, source: int, sequences: Sequences, longest: int) -> None:
        if len(sequences) == 0:
            raise UserError(
                f"source '{self.source_names[source]}' has nothing to train on: of its {len(self._spec.stores[source])} "
                f"documents none has 1 … {longest} tokens (data.capacity with data.overlong: {self._spec.data.overlong})"
            )

    def _positions(self, step: int) -> list[Position]:
        steps = np.array([step - self.start_step])
        if len(self._cursors) > 1:
            drawn = self._cursor_of[self.schedule.indices(self.start_step, step)]
            steps = np.bincount(drawn, minlength=len(self._cursors))
        bins = steps * self._spec.global_batch_bins
        parts = zip(self._cursors, self._starts, bins.tolist(), strict=True)
        return [cursor.stream.advance(start, count) for cursor, start, count in parts]


def _steps_until(schedule: ObjectiveSchedule, total: float, per_step: NDArray[np.float64]) -> int:
    """The least number of steps whose objectives' `per_step`, float64 [objectives], add up to `total`."""
    counts, size = np.zeros((1, len(per_step)), np.int64), 1 << 16
    for start in itertools.count(0, size):
        drawn = schedule.indices(start, start + size)
        counts = counts[-1] + np.cumsum(drawn[:, None] == np.arange(len(per_step)), axis=0)
        reached = counts @ per_step >= total * (1 - 1e-9)
        if reached[-1]:
            return start + int(reached.argmax()) + 1
    raise AssertionError("an objective has a probability, so it is drawn at some step")


def _current_version(state: Mapping[str, Any]) -> Mapping[str, Any]:
    if state["version"] == 1:
        return translate_state(state)
    if state["version"] != STATE_VERSION:
        raise UserError(
            f"the checkpoint's loader state has version {state['version']}, this program reads 1 to "
            f"{STATE_VERSION}: resume with the program that wrote it"
        )
    return state


def _expanded(objective: Objective, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """What `expand` gives. Raises `UserError` where no bin could hold sequences of such lengths."""
    expanded = np.asarray(objective.expand(lengths))
    is_integer = np.issubdtype(expanded.dtype, np.integer)
    if expanded.shape != lengths.shape or not is_integer or (expanded < 1).any():
        raise UserError(
            f"objective '{objective.name}': expand() must give whole numbers of at least 1, one per document, "
            f"got {expanded.dtype} of shape {expanded.shape} for {len(lengths)} lengths"
        )
    return expanded


def _count_by_source(bins: StreamBins, sources: int) -> NDArray[np.int64]:
    """The sequences and tokens of each source, int64 [sources, 2]."""
    columns = [np.bincount(bins.source, weights, minlength=sources) for weights in (None, bins.length)]
    return np.stack(columns, axis=1).astype(np.int64)


def _members(keys: Mapping[str, Any], cursor_of: Sequence[int], cursors: int) -> list[list[Any]]:
    """The identities of each cursor's objectives."""
    numbered = list(enumerate(cursor_of))
    return [[keys[f"objectives[{i}]"] for i, n in numbered if n == number] for number in range(cursors)]


def _same_plan(stream: BinStream, cursor: Mapping[str, Any]) -> bool:
    return stream.plan(int(cursor["epoch"])).fingerprint == cursor["plan"]


def _position(stream: BinStream, cursor: Mapping[str, Any]) -> Position:
    epoch, bins = int(cursor["epoch"]), int(cursor["bins_consumed"])
    return stream.advance(Position(epoch=epoch, bin=min(bins, stream.num_bins(epoch))), 0)


def _saved_counts(state: Mapping[str, Any] | None, names: Sequence[str]) -> Consumed:
    saved = state["sources"] if state else {}
    counts = [[saved[name]["rows"], saved[name]["tokens"]] if name in saved else [0, 0] for name in names]
    return Consumed(sources=tuple(names), counts=np.array(counts, dtype=np.int64))
