"""The elastic loader: this rank's micro-batches of each step, built ahead in background threads (`data.workers`).

The global sample stream is the same at any number of ranks and any accumulation, from any step on: `sample_order.py`
gives the bins of a step. `rank_assignment.py` chooses which of them this rank takes, in which micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bico_ds.attention.layout import LayoutPolicy, build_layout
from bico_ds.batch import ComparedRows, PackedBatch, target_sources
from bico_ds.common.errors import UserError
from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.data.loading.global_batch import GlobalBatch
from bico_ds.data.loading.prefetch import Prefetcher
from bico_ds.data.loading.rank_assignment import assign_to_ranks
from bico_ds.data.loading.sample_order import Consumed, SampleOrder, StreamReport, StreamSpec
from bico_ds.data.loading.targets import CutSource, check_targets
from bico_ds.data.teacher.lookup import teacher_rows
from bico_ds.documents import Documents
from bico_ds.planner.workload import Drawn


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Which part of each global batch is this rank's, and in which form.

    `pin_memory`: in page-locked memory, for copies to CUDA. `layout_policy`: workers also decide, by this policy, which
    attention kernel serves which rows, so that the first layer of a step need not.
    """

    rank: int = 0
    world_size: int = 1
    micro_batch_bins: int = 1
    pin_memory: bool = False
    layout_policy: LayoutPolicy | None = None


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """This rank's micro-batches of one optimizer step, as many on every rank.

    `room_taken` [micro-batches]: tokens of its bins' capacity that each takes, as the objective expands documents.
    `counts` and `fill` are those of the `GlobalBatch`, the same on every rank.
    """

    objective: str
    batches: Sequence[PackedBatch]
    room_taken: Sequence[int]
    counts: NDArray[np.int64]
    fill: float


class ElasticLoader:
    """This rank's `share` of the stream.

    `state` is what `state_dict` returned, at any number of ranks: the loader then begins at that state's step, `start_step`;
    `start_consumed` is what was consumed before. `schedule` says which objective each step has. `changes` lists what differs
    from the state where `data.allow_change` permits that.

    Raises `UserError` where the global batch is no multiple of micro-batch times ranks, where an objective cannot train on
    these stores, and where `SampleOrder` does.
    """

    def __init__(
        self, stream: StreamSpec, share: RankShare, *, state: Mapping[str, Any] | None = None
    ) -> None:
        # Raises where they do not divide.
        micro_batches_per_rank(stream.global_batch_bins, share.micro_batch_bins, share.world_size)
        self._stream, self._share = stream, share
        self.source_names = stream.data.source_names
        self._check_objectives()
        self._order = SampleOrder(stream, state)
        self.start_step, self.changes = self._order.start_step, self._order.changes
        self.start_consumed, self.schedule = self._order.start_consumed, self._order.schedule
        self._prefetcher = Prefetcher(self._build_step, stream.data.workers)

    def step(self, step: int) -> RankStep:
        """Return this rank's micro-batches of optimizer step `step`, while the next steps are built in the background.

        Any step from `start_step` on; fastest in order. Raises `UserError` or `RuntimeError` for a batch that could not be
        built, naming the step and the document, and `ValueError` for a step before `start_step`.
        """
        return self._prefetcher.get(step)

    @property
    def wait_seconds(self) -> float:
        """Seconds that `step` has kept its caller waiting so far."""
        return self._prefetcher.wait_seconds

    def total_steps(self, epochs: float, *, source: int | None = None) -> int:
        """Return the optimizer steps of `epochs` data epochs, or passes over the source of this number, rounded up."""
        return self._order.total_steps(epochs, source=source)

    def state_dict(self, next_step: int, consumed: Consumed) -> dict[str, Any]:
        """Return what a loader needs to go on at `next_step`, JSON-able; workers may be ahead of it.

        `consumed` is `start_consumed` plus the counts of the steps before.
        """
        return self._order.state_dict(next_step, consumed)

    def report(self) -> list[StreamReport]:
        """Describe the first data epoch of each stream of bins: fill, and what became of each source's documents."""
        return self._order.report()

    def drawn(self, objective: int) -> Drawn:
        """Return the sequences of a data epoch of the objective of this number."""
        return self._order.drawn(objective)

    def check_targets(self) -> list[str]:
        """Return warnings about what of the data can never be learned from; reads the ends of all documents.

        Raises `UserError` where nothing of a source can ever be a target for an objective that draws from it.
        """
        objectives = self._stream.schedule.objectives
        sources = [
            CutSource(
                number=number,
                name=name,
                store=store,
                sequences={
                    objective: self._order.sequences_of(objective)[number]
                    for objective in range(len(objectives))
                    if number in self._stream.sources(objective)
                },
            )
            for number, (name, store) in enumerate(zip(self.source_names, self._stream.stores, strict=True))
        ]
        return check_targets(objectives, sources, self._stream.data)

    def close(self) -> None:
        """Stop the workers."""
        self._prefetcher.close()

    def _build_step(self, step: int) -> RankStep:
        batch, share = self._order.batch(step), self._share
        cost = np.add.reduceat(batch.bins.length**2, batch.bins.offsets[:-1])
        assigned = assign_to_ranks(cost, micro_batch_bins=share.micro_batch_bins, world_size=share.world_size)
        entries = [batch.entries(bins) for bins in assigned[share.rank]]
        try:
            batches = [self._build(batch, chosen) for chosen in entries]
        except Exception as error:
            named = batch.named(error, lambda entry: self._build(batch, entry), self.source_names)
            raise type(named)(f"step {step}, {named}") from error
        if (policy := share.layout_policy) is not None:
            batches = [replace(packed, layout=build_layout(packed.plan, policy)) for packed in batches]
        return RankStep(
            objective=batch.objective.name,
            batches=[packed.pin_memory() for packed in batches] if share.pin_memory else batches,
            room_taken=[int(batch.bins.length[chosen].sum()) for chosen in entries],
            counts=batch.counts,
            fill=batch.fill,
        )

    def _build(self, batch: GlobalBatch, entries: NDArray[np.int64]) -> PackedBatch:
        built = batch.build(entries, self._stream.stores, vocabulary=self._stream.vocabulary)
        return self._with_sources(built.packed, built.documents, built.sequences)

    def _with_sources(
        self, packed: PackedBatch, documents: Documents, sequences: NDArray[np.int64]
    ) -> PackedBatch:
        """The batch with the source of each target, where there are several, and the rows that are compared."""
        retention = self._stream.retention if packed.plan.mode == "causal" else None
        if len(self.source_names) == 1 and retention is None:
            return packed
        packed = replace(packed, target_sources=(sources := target_sources(packed)))
        if retention is None:
            return packed
        numbers = torch.tensor(self._stream.data.source_numbers(retention.on))
        index = torch.isin(sources, numbers).nonzero()[:, 0]
        teachers = self._stream.teachers
        compared = ComparedRows(
            index=index,
            exclude_target=retention.exclude_target,
            teacher=teacher_rows(teachers, packed, index, documents, sequences) if teachers else None,
        )
        return replace(packed, compared=compared)

    def _check_objectives(self) -> None:
        for number, objective in enumerate(self._stream.schedule.objectives):
            for source in self._stream.sources(number):
                name, store = self.source_names[source], self._stream.stores[source]
                try:
                    objective.check(store)
                except UserError as error:
                    raise UserError(f"source '{name}': {error}") from error
                except Exception as error:
                    error.add_note(f"in check() of objective '{objective.name}' on source '{name}'")
                    raise
