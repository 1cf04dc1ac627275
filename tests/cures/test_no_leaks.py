"""A token changes the losses whose rows see it, by however many layers, that of its own prediction, and no other bit."""

from __future__ import annotations

import numpy as np
import pytest

from bico_ds.documents import Documents
from tests.cures.comparing import (
    BACKENDS,
    BOS,
    CURES,
    EOS,
    MASKS,
    VOCABULARY,
    built,
    losses_of,
    make_documents,
    rows_of,
    tiny_llama,
)
from tests.cures.definitions import Rows


def reached(before: Rows, after: Rows) -> list[bool]:
    """Of each prediction of a document, whether a change of its tokens can change its loss."""
    sees = np.array(before.sees) | np.eye(len(before.tokens), dtype=bool)
    depends = np.linalg.matrix_power(sees.astype(float), len(sees)) > 0
    changed = np.array(before.tokens) != np.array(after.tokens)
    return [
        bool((depends[i] & changed).any()) or target != after.predicts[i]
        for i, target in enumerate(before.predicts)
        if target is not None
    ]


def with_token(documents: Documents, at: int) -> Documents:
    """The same documents with another id at one place."""
    tokens = documents.token_ids.copy()
    tokens[at] = 3 + (tokens[at] - 2) % (VOCABULARY - 3)
    return Documents(**{**vars(documents), "token_ids": tokens})


@pytest.mark.parametrize("backend", ["mixed", "hidden keys"])
@pytest.mark.parametrize("cure", CURES)
def test_a_token_changes_the_losses_that_may_see_it_and_no_bit_of_others(cure: str, backend: str) -> None:
    """Between two documents, one with spans of one token and of several, a kept token apart and more."""
    masks, model = [MASKS[1], MASKS[3], MASKS[2]], tiny_llama(BACKENDS[backend])
    documents = make_documents(masks, seed=6)
    before = losses_of(model, built(CURES[cure], documents, masks))
    rows = rows_of(CURES[cure], documents, masks)
    seen = 0
    for at in range(*documents.offsets[1:3]):
        if documents.token_ids[at] in (BOS, EOS):
            continue
        changed = with_token(documents, at)
        after = losses_of(model, built(CURES[cure], changed, masks))
        may = [
            reach
            for row, other in zip(rows, rows_of(CURES[cure], changed, masks), strict=True)
            for reach in reached(row, other)
        ]
        assert (before != after).tolist() == may
        seen += sum(may)
    assert seen > 0
