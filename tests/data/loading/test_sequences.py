"""Documents cut into sequences: nothing lost, nothing twice, and what is lost on request is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.common.errors import UserError
from bico_ds.data.loading.sequences import cut_documents, longest_sequence
from tests.data.stores import BOS, write_store


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=20),
    longest=st.integers(2, 40),
    add_bos=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_split_pieces_reassemble_into_the_documents(tmp_path_factory, lengths, longest, add_bos):
    if sum(lengths) == 0:
        return
    store = write_store(tmp_path_factory.mktemp("s") / "store", lengths, add_bos=add_bos)
    sequences = cut_documents(
        store.lengths, longest=longest, overlong="split", bos_id=BOS if add_bos else None
    )
    documents = sequences.read(np.arange(len(sequences)), store, source=0)
    rebuilt: dict[int, list[int]] = {}
    for piece in documents:
        tokens = piece.token_ids.tolist()
        assert 1 <= len(tokens) <= longest
        if piece.piece and add_bos:
            assert tokens.pop(0) == BOS
        assert piece.piece == 0 or len(rebuilt[piece.id]) > 0
        rebuilt.setdefault(piece.id, []).extend(tokens)
    complete = {d.id: d.token_ids.tolist() for d in store.whole(np.arange(len(lengths))) if len(d.token_ids)}
    assert rebuilt == complete
    report = sequences.report
    assert report.split == sum(length > longest for length in lengths)
    assert report.dropped == sum(length == 0 for length in lengths)
    assert report.lost_tokens == 0


def test_a_piece_counts_as_prompt_what_the_document_counts_as_prompt(tmp_path):
    store = write_store(tmp_path / "store", [50, 70, 33], add_bos=True)
    sequences = cut_documents(store.lengths, longest=10, overlong="split", bos_id=BOS)
    documents = sequences.read(np.arange(len(sequences)), store, source=0)
    targets = {d.id: 0 for d in documents}
    for piece in documents:
        targets[piece.id] += len(piece.token_ids) - max(piece.prompt_length, 1)
    for document in store.whole(np.arange(3)):
        assert targets[document.id] == len(document.token_ids) - max(document.prompt_length, 1)


def test_the_bos_of_a_later_piece_is_a_word_of_its_own_and_no_entity(tmp_path):
    store = write_store(tmp_path / "store", [50, 70, 33], add_bos=True, has_entities=True)
    sequences = cut_documents(store.lengths, longest=10, overlong="split", bos_id=BOS)
    pieces = sequences.read(np.arange(len(sequences)), store, source=0)
    for number, (start, length) in enumerate(zip(sequences.start, sequences.length, strict=True)):
        complete = store.whole(sequences.document[number : number + 1])
        words, entities = (
            complete.word_starts[start : start + length],
            complete.entity_number[start : start + length],
        )
        if sequences.piece[number]:
            words[0], entities[0] = True, 0
        at = slice(pieces.offsets[number], pieces.offsets[number + 1])
        assert np.array_equal(pieces.word_starts[at], words)
        assert np.array_equal(pieces.entity_number[at], entities)


def test_truncated_and_dropped_tokens_are_counted():
    lengths = np.array([5, 12, 0, 30])
    truncated = cut_documents(lengths, longest=10, overlong="truncate")
    assert truncated.length.tolist() == [5, 10, 10]
    assert (truncated.report.truncated, truncated.report.dropped, truncated.report.lost_tokens) == (2, 1, 22)
    dropped = cut_documents(lengths, longest=10, overlong="drop")
    assert dropped.document.tolist() == [0]
    assert (dropped.report.dropped, dropped.report.lost_tokens) == (3, 42)


def test_longest_sequence_respects_an_expansion_that_doubles():
    assert longest_sequence(lambda lengths: 2 * lengths, 33) == 16
    with pytest.raises(UserError, match=r"data\.capacity is 3"):
        longest_sequence(lambda lengths: 2 * lengths, 3)
