"""Reverse training's texts against a slow reference: words, entities, drawn segments, and what stays in its place."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.reverse import ReverseSpec
from bico_ds.documents import Document, Documents
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.reverse import ReverseTraining
from tests.objectives.bico_reference import read_back
from tests.objectives.test_possible_targets import told

KEY = BatchKey(seed=5, epoch=0)
# Every token of a document names its position: special ones from 1000 on, others from 10 on.
SPECIAL = tuple(range(1000, 1200))
SEGMENTS = [("word", 25), ("entity", 25), ("random", 1), ("random", 3)]


def reverse(segments: str = "word", max_words: int = 25) -> ReverseTraining:
    spec = ReverseSpec.model_validate({"segments": segments, "max_words": max_words})
    return ReverseTraining(spec=spec, special_ids=SPECIAL)


def make_documents(lengths: list[int], seed: int, first_id: int = 0) -> Documents:
    """Documents with special tokens anywhere, which are words, and up to two entities."""
    rng = np.random.default_rng(seed)
    documents = []
    for index, length in enumerate(lengths):
        special = rng.random(length) < 0.2
        special[0] |= rng.random() < 0.5
        special[-1] |= rng.random() < 0.5
        tokens = np.arange(length) + np.where(special, 1000, 10)
        starts = special | (rng.random(length) < 0.5)
        starts[1:] |= special[:-1]
        starts[0] = True
        edges = np.sort(rng.choice(length + 1, size=4)).reshape(2, 2)
        documents.append(
            Document(
                token_ids=tokens,
                source=0,
                id=first_id + index,
                word_starts=starts,
                entity_spans=edges[edges[:, 0] < edges[:, 1]],
            )
        )
    return Documents.of(documents)


def texts_of(objective: ReverseTraining, documents: Documents, key: BatchKey = KEY) -> list[list[int]]:
    """What each document became."""
    return [
        [token for token, _ in document["kept"]] for document in read_back(objective.build(documents, key))
    ]


def parts_of(document: Document, *, entities: bool = False) -> tuple[list[int], list[list[int]], list[int]]:
    """What stays first, the words between, and what stays last, one token after the other."""
    tokens, inside = document.token_ids.tolist(), {}
    for number, (start, end) in enumerate(document.entity_spans if entities else ()):
        inside |= dict.fromkeys(range(start, end), number)
    begin, end = 0, len(tokens)
    while begin < end and tokens[begin] in SPECIAL:
        begin += 1
    while end > begin and tokens[end - 1] in SPECIAL:
        end -= 1
    words: list[list[int]] = []
    for at in range(begin, end):
        in_one_entity = at > 0 and at in inside and inside[at] == inside.get(at - 1)
        if not words or (document.word_starts[at] and not in_one_entity):
            words.append([])
        words[-1].append(tokens[at])
    return tokens[:begin], words, tokens[end:]


LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=8)


@given(lengths=LENGTHS, segments=st.sampled_from(["word", "entity"]), seed=st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_the_words_or_entities_come_in_reversed_order_and_all_tokens_train(lengths, segments, seed):
    documents = make_documents(lengths, seed)
    batch = reverse(segments).build(documents, KEY)
    assert batch.plan.mode == "causal"
    assert batch.represented_tokens == sum(lengths)
    for document, read in zip(documents, read_back(batch), strict=True):
        first, words, last = parts_of(document, entities=segments == "entity")
        expected = [*first, *(token for word in words[::-1] for token in word), *last]
        assert read["kept"] == [(token, i) for i, token in enumerate(expected)]
        assert read["predictions"] == {i: expected[i + 1] for i in range(len(expected) - 1)}


def test_the_largest_bound_leaves_a_text_as_it_is_and_a_larger_one_is_refused():
    documents = make_documents([40, 60], seed=1)
    texts = texts_of(reverse("random", 2**31 - 1), documents)
    assert texts == [document.token_ids.tolist() for document in documents]
    with pytest.raises(ValidationError, match="words are counted by 32-bit numbers"):
        reverse("random", 2**31)


@pytest.mark.parametrize(("segments", "max_words"), SEGMENTS)
@given(lengths=LENGTHS, seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_reversed_document_has_exactly_its_tokens(segments, max_words, lengths, seed):
    documents = make_documents(lengths, seed)
    texts = texts_of(reverse(segments, max_words), documents)
    for document, text in zip(documents, texts, strict=True):
        assert sorted(text) == sorted(document.token_ids.tolist())


def test_an_entity_stays_whole_with_the_parts_of_words_at_its_ends():
    starts = np.isin(np.arange(9), [0, 1, 3, 4, 6, 7])
    document = Document(
        token_ids=np.array([1000, 11, 12, 13, 14, 15, 16, 17, 1008]),
        source=0,
        id=0,
        word_starts=starts,
        entity_spans=np.array([[2, 5]]),  # from the middle of the first word to the middle of the third
    )
    (text,) = texts_of(reverse("entity"), Documents.of([document]))
    assert text == [1000, 17, 16, 11, 12, 13, 14, 15, 1008]


def drawn_segments(objective: ReverseTraining, document: Document, key: BatchKey) -> list[int]:
    """The lengths in words of a document's segments, in the order of the document: tokens are their own words."""
    (text,) = texts_of(objective, Documents.of([document]), key)
    breaks = [0, *(np.flatnonzero(np.diff(text) != 1) + 1).tolist(), len(text)]
    return np.diff(breaks)[::-1].tolist()


def words(count: int, document: int = 0) -> Document:
    """A document of words of one token each, numbered upwards."""
    return Document(
        token_ids=np.arange(10, 10 + count), source=0, id=document, word_starts=np.ones(count, bool)
    )


def test_random_segments_have_uniform_lengths_up_to_their_bound():
    objective = reverse("random", 4)
    found = [drawn_segments(objective, words(200, i), KEY) for i in range(60)]
    assert all(sum(lengths) == 200 for lengths in found)
    complete = np.concatenate([lengths[:-1] for lengths in found])  # the last one ends with the text
    assert np.bincount(complete, minlength=5)[1:] / len(complete) == pytest.approx([0.25] * 4, abs=0.04)
    assert np.corrcoef(complete[:-1], complete[1:])[0, 1] == pytest.approx(0, abs=0.08)


def test_random_segments_depend_only_on_seed_epoch_and_document():
    documents = make_documents([30, 9, 33, 20], 3)
    objective = reverse("random", 4)
    together, singles = texts_of(objective, documents), list(documents)
    for order in ([3], [2, 0, 1]):
        assert texts_of(objective, Documents.of([singles[i] for i in order])) == [together[i] for i in order]
    assert texts_of(objective, documents, BatchKey(seed=6, epoch=0)) != together
    later = texts_of(objective, documents, BatchKey(seed=5, epoch=1))
    assert later != together
    mixed = texts_of(objective, documents, BatchKey(seed=5, epoch=np.array([0, 1, 0, 1])))
    assert mixed == [together[0], later[1], together[2], later[3]]
    other_piece = texts_of(objective, replace(documents, piece=np.ones(4, np.int64)))
    assert other_piece != together


def test_the_rest_of_a_word_that_a_piece_begins_with_is_a_word():
    starts = np.array([True, False, True])
    piece = Document(token_ids=np.array([1000, 11, 12]), source=0, id=0, piece=1, word_starts=starts)
    texts = [
        texts_of(reverse("random", 2), Documents.of([piece]), BatchKey(seed=1, epoch=epoch))[0]
        for epoch in range(30)
    ]
    assert {tuple(text) for text in texts} == {(1000, 11, 12), (1000, 12, 11)}


@given(lengths=LENGTHS, seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_random_segments_of_one_word_are_words(lengths, seed):
    documents = make_documents(lengths, seed)
    assert texts_of(reverse("random", 1), documents) == texts_of(reverse("word"), documents)


@pytest.mark.parametrize(("segments", "max_words"), SEGMENTS)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_it_may_predict_what_it_predicts_in_some_epoch_and_nothing_else(segments, max_words, lengths, seed):
    documents, objective = make_documents(lengths, seed), reverse(segments, max_words)
    predicted = [set() for _ in lengths]
    for epoch in range(60):
        batch = objective.build(documents, BatchKey(seed=3, epoch=epoch))
        for found, document in zip(predicted, read_back(batch), strict=True):
            found |= {
                token - (1000 if token in SPECIAL else 10) for token in document["predictions"].values()
            }
    assert told(objective, documents) == [
        [position in found for position in range(length)]
        for length, found in zip(lengths, predicted, strict=True)
    ]


@pytest.mark.parametrize(("segments", "max_words"), SEGMENTS)
@given(length=st.integers(2, 14), cut=st.data(), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_what_may_be_predicted_in_a_part_of_a_document_may_be_in_all_of_it(
    segments, max_words, length, cut, seed
):
    documents, objective = make_documents([length], seed), reverse(segments, max_words)
    begin = cut.draw(st.integers(0, length - 1))
    end = cut.draw(st.integers(begin + 1, length))
    # For both see `ReverseTraining.possible_targets`.
    assume(begin == 0 or documents.token_ids[begin] not in SPECIAL)
    entity = documents.entity_number
    is_cut = end < length and entity[end - 1] == entity[end] != 0
    assume(not (segments == "entity" and is_cut and documents.token_ids[end - 1] in SPECIAL))
    part = replace(
        documents,
        token_ids=documents.token_ids[begin:end],
        offsets=np.array([0, end - begin]),
        word_starts=documents.word_starts[begin:end],
        entity_number=documents.entity_number[begin:end],
    )
    (in_part,), (in_all,) = told(objective, part), told(objective, documents)
    assert not [p for p, possible in enumerate(in_part) if possible and not in_all[begin + p]]


def test_a_store_without_entities_is_refused_where_entities_are_to_stay_whole():
    store = SimpleNamespace(has_entities=False)
    with pytest.raises(
        UserError,
        match=r"objectives\[0\]\.segments is 'entity'.*entities_field or entities_pattern.*word or random",
    ):
        reverse("entity").check(store)
    reverse("word").check(store)
    reverse("entity").check(SimpleNamespace(has_entities=True))


def test_a_bound_of_segments_that_have_none_is_refused():
    with pytest.raises(
        ValidationError, match="'max_words' bounds random segments, and 'segments' is 'entity'"
    ):
        ReverseSpec(segments="entity", max_words=4)


@pytest.mark.parametrize(("segments", "missing"), [("word", "word starts"), ("entity", "without entities")])
def test_a_missing_column_is_never_replaced_by_another(segments, missing):
    starts = None if segments == "word" else np.ones(3, bool)
    documents = Documents.of([Document(token_ids=np.arange(3), source=0, id=1, word_starts=starts)])
    with pytest.raises(AssertionError, match=missing):
        reverse(segments).build(documents, KEY)


def test_the_identity_has_the_segments_and_the_tokens_that_may_stay():
    assert reverse("random", 3).identity() == {
        "kind": "reverse",
        "version": 1,
        "segments": "random",
        "max_words": 3,
        "special_ids": list(SPECIAL),
    }
