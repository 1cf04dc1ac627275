"""What all ranks together do in one step, and the batches that are built of a part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.data.loading.sequences import Sequences
from bico_ds.data.loading.stream import StreamBins
from bico_ds.data.store import TokenStore
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey, Objective, check_batch


@dataclass(frozen=True, kw_only=True)
class Built:
    """A batch, the D documents that it was built of, and `sequences` int64 [D], their numbers in those of their source."""

    packed: PackedBatch
    documents: Documents
    sequences: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The bins of a step, for all ranks.

    `sequences` are those of each source. `counts` int64 [sources, 2]: the batch's sequences and tokens of each source, which
    its consumer adds up. `fill` is the fraction of its bins' room that is taken. `seed`: what its objective draws by.
    """

    objective: Objective
    seed: int
    sequences: list[Sequences]
    bins: StreamBins
    counts: NDArray[np.int64]
    fill: float

    def entries(self, bins: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the entries of these bins, bin after bin."""
        offsets = self.bins.offsets
        return np.concatenate([np.arange(offsets[b], offsets[b + 1]) for b in bins.tolist()])

    def build(self, entries: NDArray[np.int64], stores: Sequence[TokenStore], *, vocabulary: int) -> Built:
        """Build a batch of these entries, ordered by source. Raises what the objective raises, and as `check_batch` does."""
        bins = self.bins
        entries = entries[np.argsort(bins.source[entries], kind="stable")]
        source, sequences = bins.source[entries], bins.sequence[entries]
        documents = Documents.concatenate(
            [
                self.sequences[s].read(sequences[source == s], stores[s], source=s)
                for s in np.unique(source).tolist()
            ]
        )
        packed = self.objective.build(documents, BatchKey(seed=self.seed, epoch=bins.passes[entries]))
        check_batch(packed, documents, room=int(bins.length[entries].sum()), vocabulary=vocabulary)
        return Built(packed=packed, documents=documents, sequences=sequences)

    def named(
        self, error: Exception, build: Callable[[NDArray[np.int64]], Any], names: Sequence[str]
    ) -> Exception:
        """The error of building it again, naming the first document that `build` cannot build by itself.

        `names` are the sources'. A `UserError` stays one, all others become `RuntimeError`.
        """
        for entry in range(len(self.bins.sequence)):
            try:
                build(np.array([entry]))
            except Exception:
                source, number = int(self.bins.source[entry]), self.bins.sequence[entry]
                document, piece = (
                    column[number]
                    for column in (self.sequences[source].document, self.sequences[source].piece)
                )
                where = f"document {document} (piece {piece}) of source '{names[source]}'"
                break
        else:
            where = "documents that can each be built alone"
        kind = UserError if isinstance(error, UserError) else RuntimeError
        return kind(f"objective '{self.objective.name}': cannot build the batch of {where}: {error}")
