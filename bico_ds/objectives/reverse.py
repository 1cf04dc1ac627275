"""Reverse training (Golovneva et al., arXiv 2403.13799): next-token prediction on texts with their segments reversed.

The order of a document's segments is reversed, and inside a segment it is kept. Segments are words, or words and entities,
or runs of words of random length. So a text is read in both directions, and no name is torn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.common.random_numbers import stream, uniform
from bico_ds.config.objectives.reverse import ReverseSpec
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey, Store, TokenRoles
from bico_ds.objectives.masks import TokenGrid, draw_keys
from bico_ds.objectives.ntp import causal_batch


@dataclass(frozen=True, kw_only=True)
class ReverseTraining:
    """All tokens of a document in a new order, at positions 0 … L - 1; each predicts the next one.

    The special tokens that a document begins with (BOS) stay first, and those that it ends with (EOS) stay last; special
    tokens within it are words. A prompt is text like the rest.
    """

    spec: ReverseSpec
    special_ids: tuple[int, ...] = ()
    name: str = "reverse"
    key: str = "objectives[0]"

    @classmethod
    def of(cls, spec: ReverseSpec, tokens: TokenRoles, *, name: str, key: str) -> ReverseTraining:
        """Of `tokens`, the special ones."""
        return cls(spec=spec, special_ids=tokens.special_ids, name=name, key=key)

    def identity(self) -> dict[str, Any]:
        """The spec's, with the tokens that may stay where they are."""
        return self.spec.identity() | {"special_ids": list(self.special_ids)}

    def check(self, store: Store) -> None:
        """Raises `UserError` where entities are to stay whole, and the store has none."""
        if self.spec.segments == "entity" and not store.has_entities:
            raise UserError(
                f"{self.key}.segments is 'entity', but the token store has no entity spans: prepare the data again "
                "with entities_field or entities_pattern, or choose segments: word or random"
            )

    def expand(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents themselves: nothing is added."""
        return lengths

    @property
    def predicts(self) -> str:
        """All but what a reversed text begins with."""
        return "a token after the first one of the reversed text"

    def possible_targets(self, documents: Documents) -> NDArray[np.bool_]:
        """All tokens but each document's first one in the new order; where that is drawn, it may be another one.

        A part that begins with a special token within its document seems to have it first, and its last word is then told
        too. That misleads nobody: the special token itself is predicted in the complete document. One that ends with a
        special token within an entity seems to have it last, and tells it, where the entity may come first: in the complete
        document its next token is predicted.
        """
        grid, starts = TokenGrid.of(documents), documents.offsets[:-1]
        text = self._place(documents, grid) == 1
        words = self._words(documents, text)
        # Where no special token stays first, a text's last segment comes first. Which that is is drawn if it may be several.
        bare = text[starts]
        is_drawn = self.spec.segments == "random" and self.spec.max_words > 1
        fixed = bare & (np.add.reduceat(words, starts, dtype=np.int64) == 1) if is_drawn else bare
        last_word = np.maximum.reduceat(np.where(words, np.arange(len(words)), 0), starts)
        first = np.zeros_like(text)
        first[starts[~bare]] = True
        first[last_word[fixed]] = True
        return ~first

    def build(self, documents: Documents, key: BatchKey) -> PackedBatch:
        """Build the causal micro-batch of the reversed texts; random segments are drawn by (`key`, document)."""
        grid = TokenGrid.of(documents)
        tokens = documents.token_ids[self._order(documents, grid, key)]
        return causal_batch(
            documents, token_ids=tokens, lengths=documents.lengths, is_target=grid.position > 0
        )

    def _order(self, documents: Documents, grid: TokenGrid, key: BatchKey) -> NDArray[np.int64]:
        """Return int64 [T]: the number of the token that stands at each place."""
        place = self._place(documents, grid)
        starts = self._words(documents, place == 1)
        if self.spec.segments == "random":
            starts = _drawn_starts(starts, grid, draw_keys("segment", documents, key), self.spec.max_words)
        # Stable, so that tokens of a segment, and those before and behind the text, keep their order.
        return np.lexsort((np.where(place == 1, np.negative(np.cumsum(starts)), 0), place, grid.document))

    def _place(self, documents: Documents, grid: TokenGrid) -> NDArray[np.int64]:
        """Return int64 [T]: 1 from a document's first token that is not special to its last such one; 0 before, 2 behind."""
        special = np.isin(documents.token_ids, self.special_ids)
        count = np.concatenate([np.zeros(1, np.int64), np.cumsum(~special)])  # of tokens that are not special
        begin, end = (
            count[edges][grid.document] for edges in (documents.offsets[:-1], documents.offsets[1:])
        )
        return (count[1:] > begin) * (1 + (count[:-1] >= end))

    def _words(self, documents: Documents, text: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return bool [T]: True where a word of the text starts; an entity is a word, with all words that it touches."""
        assert documents.word_starts is not None, "every token store has word starts"
        starts = documents.word_starts.copy()
        if self.spec.segments == "entity":
            number = documents.entity_number
            assert number is not None, "`ReverseTraining.check` refuses a store without entities"
            starts[1:] &= (number[1:] == 0) | (number[1:] != number[:-1])
        starts[1:] |= ~text[:-1]
        starts[documents.offsets[:-1]] = True
        return starts & text


def _drawn_starts(
    words: NDArray[np.bool_], grid: TokenGrid, keys: NDArray[np.uint64], max_words: int
) -> NDArray[np.bool_]:
    """Return bool [T]: where segments of 1 … `max_words` words start, uniform; a document's last one ends with its text.

    The n-th segment of a document takes the n-th number of its stream. As many are drawn as it has words.
    """
    word_at = np.flatnonzero(words)
    document = grid.document[word_at]
    words_of = np.bincount(document, minlength=len(keys))
    first_word = np.cumsum(words_of) - words_of
    number = np.arange(len(word_at)) - first_word[document]
    length = 1 + (uniform(stream(keys[document], number)) * max_words).astype(np.int64)
    before = np.cumsum(length) - length
    begin = before - before[first_word[document]]  # in words of the document
    real = begin < words_of[document]
    starts = np.zeros_like(words)
    starts[word_at[(first_word[document] + begin)[real]]] = True
    return starts
