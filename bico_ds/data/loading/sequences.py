"""Sequences: what is packed. A document that is too long for a bin is split, truncated or dropped before, and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.documents import Documents

if TYPE_CHECKING:
    from bico_ds.data.store import TokenStore

Overlong = Literal["split", "truncate", "drop"]
Expand = Callable[[NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class CutReport:
    """What became of one source's documents before packing. Tokens are original ones."""

    documents: int
    tokens: int
    # Documents cut into pieces, and the pieces.
    split: int = 0
    pieces: int = 0
    # Documents cut at the end.
    truncated: int = 0
    # Documents left out: too long, or empty.
    dropped: int = 0
    # By truncating and dropping.
    lost_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """N slices of one source's documents: piece `piece` of `document` has the tokens `start` … `start + length - 1`.

    The columns are [N]. Where `bos_id` is set, it replaces the first token of every piece after a document's first one:
    the slice of such a piece begins one token early.
    """

    document: NDArray[np.integer]
    start: NDArray[np.int32]
    length: NDArray[np.int32]
    piece: NDArray[np.int32]
    bos_id: int | None
    report: CutReport

    def __len__(self) -> int:
        return len(self.document)

    def read(self, numbers: NDArray[np.int64], store: TokenStore, *, source: int) -> Documents:
        """Read the sequences of these numbers, int64 [n], from the store that they were cut from."""
        columns = (self.document, self.start, self.length, self.piece)
        ids, starts, lengths, pieces = (column[numbers].astype(np.int64) for column in columns)
        documents = store.read(ids, starts, lengths, pieces, source=source)
        later = pieces > 0
        if self.bos_id is not None and later.any():
            first = documents.offsets[:-1][later]
            documents.token_ids[first] = self.bos_id
            if documents.word_starts is not None:
                documents.word_starts[first] = True
            if documents.entity_number is not None:
                documents.entity_number[first] = 0
            if documents.is_reply is not None:
                documents.is_reply[first] = False
        return documents


def longest_sequence(expand: Expand, capacity: int) -> int:
    """Return the most tokens of a document that fits a bin after `expand`.

    Raises `UserError` where that is below 2, and where a shorter document does not fit.
    """
    lengths = np.arange(1, capacity + 1)
    fits = expand(lengths) <= capacity
    longest = int(lengths[fits].max(initial=0))
    if longest < 2 or not fits[:longest].all():
        least = int(expand(np.array([2]))[0])
        raise UserError(
            f"data.capacity is {capacity}: too small for a document of 2 tokens under this run's objectives, which make "
            f"{least} of it; raise data.capacity"
        )
    return longest


def cut_store(store: TokenStore, *, longest: int, overlong: Overlong) -> Sequences:
    """Cut the documents of a store as `cut_documents` does, with BOS where the store has it."""
    bos_id = store.manifest.bos_id if store.manifest.add_bos else None
    return cut_documents(store.lengths, longest=longest, overlong=overlong, bos_id=bos_id)


def cut_documents(
    lengths: NDArray[np.int64], *, longest: int, overlong: Overlong, bos_id: int | None = None
) -> Sequences:
    """Cut documents of these lengths, int64 [documents], into sequences of at most `longest` tokens.

    Pieces of a document do not overlap; with `bos_id` each piece after the first begins with a BOS of its own.
    """
    total = int(lengths.sum())
    fits = (lengths > 0) & (lengths <= longest)
    long = np.flatnonzero(lengths > longest)
    if overlong == "split" and len(long):
        return _split(lengths, longest, bos_id)
    kept = np.flatnonzero((lengths > 0) if overlong == "truncate" else fits)
    length = np.minimum(lengths[kept], longest).astype(np.int32)
    report = CutReport(
        documents=len(lengths),
        tokens=total,
        truncated=len(long) if overlong == "truncate" else 0,
        dropped=len(lengths) - len(kept),
        lost_tokens=total - int(length.sum()),
    )
    # Takes no memory.
    zeros = np.broadcast_to(np.int32(0), len(kept))
    return Sequences(
        document=_compact(kept), start=zeros, length=length, piece=zeros, bos_id=bos_id, report=report
    )


def _split(lengths: NDArray[np.int64], longest: int, bos_id: int | None) -> Sequences:
    stride = longest if bos_id is None else longest - 1
    pieces = np.where(lengths > longest, 1 - (-(lengths - longest) // stride), (lengths > 0).astype(np.int64))
    document = np.repeat(np.arange(len(lengths)), pieces)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = piece * stride
    report = CutReport(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        split=int((pieces > 1).sum()),
        pieces=int(pieces[pieces > 1].sum()),
        dropped=int((lengths == 0).sum()),
    )
    return Sequences(
        document=_compact(document),
        start=start.astype(np.int32),
        length=np.minimum(lengths[document] - start, longest).astype(np.int32),
        piece=piece.astype(np.int32),
        bos_id=bos_id,
        report=report,
    )


def _compact(numbers: NDArray[np.int64]) -> NDArray[np.integer]:
    return numbers.astype(np.int32) if len(numbers) < 2**31 and numbers.max(initial=0) < 2**31 else numbers
