"""Documents: the texts of a batch, in columns. numpy alone, no torch.

Shape legend: T tokens in a batch, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document (or one piece of a split one), for people and tests; the hot path uses `Documents`."""

    token_ids: NDArray[np.integer]  # [L]
    source: int
    id: int
    piece: int = 0
    prompt_length: int = 0
    group: int = -1
    word_starts: NDArray[np.bool_] | None = None  # [L]
    entity_spans: NDArray[np.int64] | None = None  # [E, 2], half-open token ranges
    is_reply: NDArray[np.bool_] | None = None  # [L]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents in columns, so that nothing on the hot path loops over them in Python.

    `offsets[d]:offsets[d + 1]` is the slice of document d in every per-token column. `source`, `id` and `piece` name
    it in every run: masks and draws are keyed by them. `prompt_length` counts the leading tokens that belong to the
    prompt (0 where the text has none); `group` is the person or cluster (-1 where unknown). The optional columns are
    None when the store does not carry them. Entity spans are kept per token: 0 outside, else 1 + the span's number
    within its document. `is_reply`: the tokens of an assistant's turns, with those that end them, or of a completion.
    """

    token_ids: NDArray[np.int64]  # [T]
    offsets: NDArray[np.int64]  # [D + 1]
    source: NDArray[np.int64]  # [D]
    id: NDArray[np.int64]  # [D]
    piece: NDArray[np.int64]  # [D]
    prompt_length: NDArray[np.int64]  # [D]
    group: NDArray[np.int64]  # [D]
    word_starts: NDArray[np.bool_] | None = None  # [T]
    entity_number: NDArray[np.int64] | None = None  # [T]
    is_reply: NDArray[np.bool_] | None = None  # [T]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def __getitem__(self, index: int) -> Document:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return Document(
            token_ids=self.token_ids[start:end],
            source=int(self.source[index]),
            id=int(self.id[index]),
            piece=int(self.piece[index]),
            prompt_length=int(self.prompt_length[index]),
            group=int(self.group[index]),
            word_starts=None if self.word_starts is None else self.word_starts[start:end],
            entity_spans=None if self.entity_number is None else _spans(self.entity_number[start:end]),
            is_reply=None if self.is_reply is None else self.is_reply[start:end],
        )

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    @staticmethod
    def of(documents: list[Document]) -> Documents:
        """Collect single documents into columns; a column that any of them lacks is left out."""
        lengths = [len(document.token_ids) for document in documents]
        has_words = all(document.word_starts is not None for document in documents)
        has_entities = all(document.entity_spans is not None for document in documents)
        has_replies = all(document.is_reply is not None for document in documents)
        column = lambda name: np.array([getattr(d, name) for d in documents], dtype=np.int64)  # noqa: E731
        return Documents(
            token_ids=np.concatenate([np.asarray(d.token_ids, dtype=np.int64) for d in documents]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            source=column("source"),
            id=column("id"),
            piece=column("piece"),
            prompt_length=column("prompt_length"),
            group=column("group"),
            word_starts=np.concatenate([d.word_starts for d in documents]) if has_words else None,
            entity_number=np.concatenate([_numbers(d) for d in documents]) if has_entities else None,
            is_reply=np.concatenate([d.is_reply for d in documents]) if has_replies else None,
        )

    @staticmethod
    def concatenate(parts: Sequence[Documents]) -> Documents:
        """Put these documents one part after another; an optional column that any part lacks is left out."""
        if len(parts) == 1:
            return parts[0]

        def column(name: str) -> NDArray:
            return np.concatenate([getattr(part, name) for part in parts])

        def optional(name: str) -> NDArray | None:
            return None if any(getattr(part, name) is None for part in parts) else column(name)

        lengths = np.concatenate([part.lengths for part in parts])
        return Documents(
            token_ids=column("token_ids"),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            source=column("source"),
            id=column("id"),
            piece=column("piece"),
            prompt_length=column("prompt_length"),
            group=column("group"),
            word_starts=optional("word_starts"),
            entity_number=optional("entity_number"),
            is_reply=optional("is_reply"),
        )


def _spans(entity_number: NDArray[np.int64]) -> NDArray[np.int64]:
    numbers = np.unique(entity_number[entity_number > 0])
    spans = [
        (np.flatnonzero(entity_number == n)[0], np.flatnonzero(entity_number == n)[-1] + 1) for n in numbers
    ]
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _numbers(document: Document) -> NDArray[np.int64]:
    numbers = np.zeros(len(document.token_ids), dtype=np.int64)
    for number, (start, end) in enumerate(document.entity_spans if document.entity_spans is not None else ()):
        numbers[start:end] = number + 1
    return numbers
