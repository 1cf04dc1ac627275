"""The elastic loader: this rank's micro-batches of each step, built ahead in background threads.

The global sample stream is the same at any number of ranks and any accumulation, from any step on: it is
`SampleOrder`'s; ranks only deal it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bico_ds.attention.layout import LayoutPolicy, layout_of
from bico_ds.batch import Documents, PackedBatch
from bico_ds.config.batch_size import micro_batches_per_rank
from bico_ds.config.errors import UserError
from bico_ds.config.schema import DataSpec
from bico_ds.data.deal import deal
from bico_ds.data.prefetch import Prefetcher
from bico_ds.data.rows import Rows, join
from bico_ds.data.sample_order import GlobalBatch, SampleOrder, StreamReport
from bico_ds.data.store import TokenStore
from bico_ds.data.stream import StreamBins
from bico_ds.objectives.base import BatchKey, Objective
from bico_ds.objectives.schedule import ObjectiveSchedule


class ElasticLoader:
    """`stores` are those of `data.sources`, in order. `state` is what `state_dict` returned, from any number
    of ranks: the loader then begins at that state's step, `start_step`. `changes` lists what differs from
    the state where `data.allow_change` lets it pass. `layout_policy`: workers also decide which kernel serves which
    rows, by this policy, so that the first layer of a step need not.

    Raises UserError where the ranks do not divide the global batch, a source has nothing to train on, an
    objective cannot train on these stores, or the state belongs to another data set or recipe.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        data: DataSpec,
        schedule: ObjectiveSchedule,
        *,
        seed: int,
        global_batch_bins: int,
        micro_batch_bins: int = 1,
        rank: int = 0,
        world_size: int = 1,
        state: Mapping[str, Any] | None = None,
        pin_memory: bool = False,
        layout_policy: LayoutPolicy | None = None,
    ) -> None:
        micro_batches_per_rank(global_batch_bins, micro_batch_bins, world_size)  # or an error
        self._stores, self._seed, self._pin_memory = tuple(stores), seed, pin_memory
        self._layout_policy = layout_policy
        self._micro_batch_bins, self._rank, self._world_size = micro_batch_bins, rank, world_size
        self._order = SampleOrder(
            stores, data, schedule, seed=seed, global_batch_bins=global_batch_bins, state=state
        )
        self.start_step, self.changes = self._order.start_step, self._order.changes
        self.source_names = self._order.source_names
        self._try_objectives(schedule.objectives)
        self._prefetcher = Prefetcher(self._build_step, data.workers)

    def step(self, step: int) -> list[PackedBatch]:
        """Return this rank's micro-batches of optimizer step `step`, as many on every rank; the next steps
        are built in the background meanwhile. Any step from `start_step` on; fastest in order.

        Raises what went wrong in a worker, naming the step and the document.
        """
        return self._prefetcher.get(step)

    @property
    def wait_seconds(self) -> float:
        """Seconds that `step` has kept its caller waiting so far."""
        return self._prefetcher.wait_seconds

    def total_steps(self, epochs: float) -> int:
        """Return the optimizer steps of so many data epochs, rounded up."""
        return self._order.total_steps(epochs)

    def state_dict(self, next_step: int) -> dict[str, Any]:
        """Return what a loader needs to go on at `next_step`, JSON-able; workers may be ahead of it."""
        return self._order.state_dict(next_step)

    def source_totals(self, next_step: int) -> dict[str, dict[str, int]]:
        """Return the rows and tokens by source, `{name: {"rows", "tokens"}}`, that all ranks consume before
        `next_step`; to be asked in rising order."""
        return self._order.source_totals(next_step)

    def report(self) -> list[StreamReport]:
        """Describe one data epoch: bins, fill, and what became of each source's documents."""
        return self._order.report()

    def close(self) -> None:
        """Stop the workers."""
        self._prefetcher.close()

    def _build_step(self, step: int) -> list[PackedBatch]:
        batch = self._order.batch(step)
        cost = np.add.reduceat(batch.bins.length**2, batch.bins.offsets[:-1])
        dealt = deal(cost, micro_batch_bins=self._micro_batch_bins, world_size=self._world_size)
        try:
            batches = [self._build(batch, _entries(batch.bins, bins)) for bins in dealt[self._rank]]
        except Exception as error:
            raise self._named(error, batch, step) from error
        if self._layout_policy is not None:
            for packed in batches:
                layout_of(packed.plan, self._layout_policy)
        return [packed.pin_memory() for packed in batches] if self._pin_memory else batches

    def _build(self, batch: GlobalBatch, entries: NDArray[np.int64]) -> PackedBatch:
        """Build the micro-batch of these rows of the global batch, ordered by source."""
        bins = batch.bins
        entries = entries[np.argsort(bins.source[entries], kind="stable")]
        documents = self._read(batch.rows, bins.source[entries], bins.row[entries])
        return batch.objective.build(documents, BatchKey(seed=self._seed, epoch=bins.passes[entries]))

    def _read(self, rows: Sequence[Rows], source: NDArray[np.int64], row: NDArray[np.int64]) -> Documents:
        return join(
            [
                rows[number].read(row[source == number], self._stores[number], source=number)
                for number in np.unique(source).tolist()
            ]
        )

    def _try_objectives(self, objectives: Sequence[Objective]) -> None:
        """Build a first document of each source with each objective: one that lacks a column says so now."""
        for number, (name, store) in enumerate(zip(self.source_names, self._stores, strict=True)):
            first = store.whole(np.array([int(np.argmax(store.lengths > 0))]), source=number)
            for objective in objectives:
                try:
                    objective.build(first, BatchKey(seed=self._seed, epoch=0))
                except UserError as error:
                    raise UserError(f"source '{name}': {error}") from error

    def _named(self, error: Exception, batch: GlobalBatch, step: int) -> Exception:
        """The error again, naming the first document of the step that cannot be built by itself."""
        for entry in range(len(batch.bins.row)):
            try:
                self._build(batch, np.array([entry]))
            except Exception:
                number, row = int(batch.bins.source[entry]), batch.bins.row[entry]
                rows = batch.rows[number]
                where = (
                    f"document {rows.document[row]} (piece {rows.piece[row]}) of source "
                    f"'{self.source_names[number]}'"
                )
                break
        else:
            where = "documents that are sound one by one"
        kind = UserError if isinstance(error, UserError) else RuntimeError
        return kind(
            f"step {step}, objective '{batch.objective.name}': cannot build the batch of {where}: {error}"
        )


def _entries(bins: StreamBins, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of the chosen bins, bin after bin."""
    return np.concatenate([np.arange(bins.offsets[b], bins.offsets[b + 1]) for b in chosen.tolist()])
