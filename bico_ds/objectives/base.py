"""What an objective is: documents in, packed batch out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bico_ds.batch import Documents, PackedBatch


@dataclass(frozen=True, kw_only=True)
class BatchKey:
    """What randomness may depend on besides a document's own name: never its place, neighbours, rank or
    history.

    `epoch` is the pass over the document's source: one number, or one a document (int64 [D]), since a batch
    at the end of an epoch holds documents of the next one too.
    """

    seed: int
    epoch: int | NDArray[np.int64]


class Objective(Protocol):
    """Decides what is visible and what is predicted."""

    @property
    def name(self) -> str:
        """Short and unique within a run: a tag in logs."""
        ...

    def expand(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row lengths [D] that documents of these lengths occupy in a bin. Pure, known before
        packing."""
        ...

    def build(self, documents: Documents, key: BatchKey) -> PackedBatch:
        """Build the micro-batch of these documents. Raises ValueError naming a document that cannot be
        trained on."""
        ...
