"""A held-out store as an objective reads it: micro-batches that are the same at every evaluation, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bico_ds.batch import PackedBatch
from bico_ds.config.schema import Recipe
from bico_ds.data.loading.draws import seed_of_draws
from bico_ds.data.loading.global_batch import GlobalBatch
from bico_ds.data.loading.packing import build_pack_plan
from bico_ds.data.loading.sequences import Sequences, cut_store, longest_sequence
from bico_ds.data.loading.stream import StreamBins
from bico_ds.data.store import TokenStore
from bico_ds.objectives.base import Objective

# Not the run's: runs that differ in their seed alone, or go on after a resume, are measured by the same masks.
_SEED, _EPOCH = 0, 0


@dataclass(frozen=True, kw_only=True)
class FixedBatches:
    """The bins of a store under one objective, of which `micro_batch_bins` go through the model at once.

    `vocabulary`: ids that the model embeds.
    """

    store: TokenStore
    bins: GlobalBatch
    micro_batch_bins: int
    vocabulary: int

    @property
    def objective(self) -> Objective:
        return self.bins.objective

    @property
    def count(self) -> int:
        """How many micro-batches there are."""
        return -(-(len(self.bins.bins.offsets) - 1) // self.micro_batch_bins)

    def build(self, number: int) -> PackedBatch:
        """The micro-batch of this number. Raises `UserError` or `RuntimeError` that names the document."""
        first = number * self.micro_batch_bins
        last = min(first + self.micro_batch_bins, len(self.bins.bins.offsets) - 1)
        try:
            return self._build(self.bins.entries(np.arange(first, last)))
        except Exception as error:
            raise self.bins.named(error, self._build, [str(self.store.path)]) from error

    def _build(self, entries: NDArray[np.int64]) -> PackedBatch:
        return self.bins.build(entries, [self.store], vocabulary=self.vocabulary).packed

    @cached_property
    def identity(self) -> str:
        """A digest of the texts, how they are cut, and the objective: losses compare where it is equal."""
        sequences = self.bins.sequences[0]
        digest = hashlib.sha256(
            json.dumps([self.store.fingerprint, self.objective.identity(), self.bins.seed]).encode()
        )
        for column in (sequences.document, sequences.start, sequences.length):
            digest.update(np.ascontiguousarray(column, dtype=np.int64).data)
        return digest.hexdigest()[:16]


def fixed_batches(
    store: TokenStore,
    objective: Objective,
    recipe: Recipe,
    *,
    limit: int | None,
    draws: int,
    vocabulary: int,
) -> FixedBatches:
    """The store's documents, cut and packed as the recipe's data are, or `limit` of them spread over it.

    `draws`: the number of the objective among those of its kind. Raises `ValueError` where no document is left.
    """
    data = recipe.data
    longest = longest_sequence(objective.expand, data.capacity)
    sequences = _of_documents(
        cut_store(store, longest=longest, overlong=data.overlong), _spread(store, limit)
    )
    lengths = objective.expand(sequences.length.astype(np.int64))
    plan = build_pack_plan(
        lengths, capacity=data.capacity, seed=_SEED, max_documents_per_bin=data.max_documents_per_bin
    )
    order = plan.sequence_order.astype(np.int64)
    bins = StreamBins(
        source=np.zeros_like(order),
        sequence=order,
        passes=np.full_like(order, _EPOCH),
        length=lengths[order],
        offsets=plan.bin_offsets,
    )
    taken = int(lengths.sum())
    return FixedBatches(
        store=store,
        bins=GlobalBatch(
            objective=objective,
            seed=seed_of_draws(_SEED, draws),
            sequences=[sequences],
            bins=bins,
            counts=np.array([[len(order), taken]]),
            fill=taken / (plan.num_bins * data.capacity),
        ),
        micro_batch_bins=recipe.training.micro_batch_bins,
        vocabulary=vocabulary,
    )


def _spread(store: TokenStore, limit: int | None) -> NDArray[np.int64]:
    """The numbers of so many documents, evenly over the store: its beginning may be of one kind."""
    count = len(store) if limit is None else min(limit, len(store))
    return np.arange(count) * len(store) // max(count, 1)


def _of_documents(sequences: Sequences, documents: NDArray[np.int64]) -> Sequences:
    """The sequences of these documents alone; the report stays that of all."""
    chosen = np.isin(sequences.document, documents)
    return Sequences(
        document=sequences.document[chosen],
        start=sequences.start[chosen],
        length=sequences.length[chosen],
        piece=sequences.piece[chosen],
        bos_id=sequences.bos_id,
        report=sequences.report,
    )
