"""Mask policies: which tokens of a document BICO masks. One decision per unit: a token, span, word or entity.

Every draw is keyed by (seed, epoch, source, document, piece) and counted by position (an entity's by its number), so
that a document's mask is the same on any machine, in any batch, at any world size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.random_numbers import hash_words, stream, uniform
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """Where each of T tokens stands: `document` int64 [T] and `position` int64 [T] within it."""

    document: NDArray[np.int64]
    position: NDArray[np.int64]

    @staticmethod
    def of(documents: Documents) -> TokenGrid:
        """The grid of these documents. Raises `ValueError` for a document without a token, and for no documents."""
        lengths = documents.lengths
        if len(lengths) == 0 or (lengths < 1).any():
            name = _describe(documents, int(np.argmax(lengths < 1))) if len(lengths) else "the batch"
            raise ValueError(f"{name} has no tokens")
        total = int(documents.offsets[-1] - documents.offsets[0])
        position = np.arange(total) - np.repeat(documents.offsets[:-1], lengths)
        return TokenGrid(document=np.repeat(np.arange(len(lengths)), lengths), position=position)


def _describe(documents: Documents, index: int) -> str:
    """Name a document for a message."""
    source, document, piece = (int(c[index]) for c in (documents.source, documents.id, documents.piece))
    return f"document {document} of source {source}" + (f", piece {piece}" if piece else "")


@dataclass(frozen=True, kw_only=True)
class MaskPolicy:
    """Draws masks by a `MaskSpec`; `special_ids` and first tokens are never masked.

    A chosen unit has all of its eligible tokens masked, so the rate is the expected share of eligible
    tokens (for entities: of the tokens inside entities; the others are never masked).
    """

    spec: MaskSpec
    special_ids: tuple[int, ...] = ()

    def draw(self, documents: Documents, grid: TokenGrid, key: BatchKey) -> NDArray[np.bool_]:
        """Return bool [T]: True where a token is masked."""
        rates = self.rates(documents, key)
        document_keys = draw_keys("mask", documents, key)
        chosen = _UNITS[self.spec.unit](self.spec, documents, grid, document_keys, rates)
        return chosen & self.eligible(documents, grid)

    def rates(self, documents: Documents, key: BatchKey) -> NDArray[np.float64]:
        """Return float64 [D]: the mask rate of each document."""
        if not isinstance(self.spec.rate, tuple):
            return np.full(len(documents), self.spec.rate)
        low, high = self.spec.rate
        return low + (high - low) * uniform(draw_keys("rate", documents, key))

    def eligible(self, documents: Documents, grid: TokenGrid) -> NDArray[np.bool_]:
        """Return bool [T]: True where a mask is allowed."""
        eligible = grid.position > 0
        for special_id in self.special_ids:  # several times as fast as `np.isin`
            eligible &= documents.token_ids != special_id
        if self.spec.eligible == "completion":
            eligible &= grid.position >= documents.prompt_length[grid.document]
        if self.spec.eligible == "replies":
            eligible &= replies_of(documents)
        if self.spec.unit == "entity":
            eligible &= _entity_numbers(documents) > 0
        return eligible


def replies_of(documents: Documents) -> NDArray[np.bool_]:
    """Return bool [T]: the tokens of replies."""
    assert documents.is_reply is not None, "`require_replies` refuses a store without them"
    return documents.is_reply


def draw_keys(purpose: str, documents: Documents, key: BatchKey) -> NDArray[np.uint64]:
    """Return uint64 [D]: the key of each document's draws for this purpose, of at most 8 characters."""
    return hash_words(purpose, key.seed, key.epoch, documents.source, documents.id, documents.piece)


def _draw_tokens(
    spec: MaskSpec,
    documents: Documents,
    grid: TokenGrid,
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
) -> NDArray[np.bool_]:
    return uniform(stream(keys[grid.document], grid.position)) < rates[grid.document]


def _draw_spans(
    spec: MaskSpec,
    documents: Documents,
    grid: TokenGrid,
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Masked and unmasked runs alternate, both of geometric length: a stationary two-state Markov chain.

    `leave` = 1 / mean span ends a run, `enter` begins one, with the share of masked tokens at the rate.
    Independent tokens at this rate already form spans of mean 1 / (1 - rate): that is the shortest mean
    there is. Each position's uniform number either sets the state, clears it, or keeps the one before, so
    the chain is a running maximum over the last position that decided.
    """
    unmasked = 1.0 - rates
    leave = np.minimum(1.0 / spec.mean_span, unmasked)
    enter = np.where(unmasked > 0, rates * leave / np.maximum(unmasked, 1e-300), 1.0)
    draws = uniform(stream(keys[grid.document], grid.position))
    first = grid.position == 0
    sets = draws < np.where(first, rates[grid.document], enter[grid.document])
    decides = sets | first | (draws >= 1.0 - leave[grid.document])
    decided_at = np.maximum.accumulate(np.where(decides, np.arange(len(draws)), 0))
    return sets[decided_at]


def _draw_words(
    spec: MaskSpec,
    documents: Documents,
    grid: TokenGrid,
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
) -> NDArray[np.bool_]:
    assert documents.word_starts is not None, "every token store has word starts"
    starts = documents.word_starts | (grid.position == 0)
    first_token = np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
    return uniform(stream(keys[grid.document], grid.position[first_token])) < rates[grid.document]


def _draw_entities(
    spec: MaskSpec,
    documents: Documents,
    grid: TokenGrid,
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
) -> NDArray[np.bool_]:
    return uniform(stream(keys[grid.document], _entity_numbers(documents))) < rates[grid.document]


def _entity_numbers(documents: Documents) -> NDArray[np.int64]:
    assert documents.entity_number is not None, "`MaskDenoising.check` refuses a store without entities"
    return documents.entity_number


_UNITS: dict[str, Callable[..., NDArray[np.bool_]]] = {
    "token": _draw_tokens,
    "span": _draw_spans,
    "word": _draw_words,
    "entity": _draw_entities,
}
