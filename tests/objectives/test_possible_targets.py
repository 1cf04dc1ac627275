"""What an objective tells of the tokens that it may predict, against all that it ever predicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.documents import Document, Documents
from bico_ds.objectives.base import BatchKey, TargetRule
from bico_ds.objectives.ntp import NextTokenPrediction
from tests.objectives.bico_reference import read_back
from tests.objectives.test_masked import in_place, infilling
from tests.objectives.test_objectives import BOS, EOS, UNITS, bico

DRAWS = 60


def random_documents(lengths: list[int], seed: int) -> Documents:
    """Documents with special tokens anywhere, prompts of any length (all of a document too), and up to two entities."""
    rng, of_replies = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    documents = []
    for index, length in enumerate(lengths):
        edges = np.sort(rng.choice(length + 1, size=4)).reshape(2, 2)
        documents.append(
            Document(
                token_ids=np.where(
                    rng.random(length) < 0.4, rng.choice([BOS, EOS], length), rng.integers(3, 99, length)
                ),
                source=0,
                id=index,
                prompt_length=int(rng.integers(0, length + 1)),
                word_starts=rng.random(length) < 0.5,
                entity_spans=edges[edges[:, 0] < edges[:, 1]],
                is_reply=of_replies.random(length) < 0.5,
            )
        )
    return Documents.of(documents)


def ever_predicted(objective, documents: Documents, ahead: int = 1) -> list[list[bool]]:
    """By position of each document: whether any of many epochs has a target there, read from the batches.

    A row predicts the token so many positions `ahead`.
    """
    found = [[False] * length for length in documents.lengths]
    for epoch in range(DRAWS):
        batch = objective.build(documents, BatchKey(seed=3, epoch=epoch))
        for positions, document in zip(found, read_back(batch), strict=True):
            for row in document["predictions"]:
                positions[row + ahead] = True
    return found


def told(objective, documents: Documents) -> list[list[bool]]:
    assert isinstance(objective, TargetRule)
    return [
        part.tolist() for part in np.split(objective.possible_targets(documents), documents.offsets[1:-1])
    ]


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(
    lengths=LENGTHS,
    made=st.sampled_from([(bico, 1), (in_place, 0), (infilling, 1)]),
    unit=st.sampled_from(UNITS),
    eligible=st.sampled_from(["all", "completion", "replies"]),
    special=st.sampled_from([(BOS, EOS), ()]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_masked_tokens_may_be_predicted_that_are_in_some_epoch_and_no_others(
    lengths, made, unit, eligible, special, seed
):
    make, ahead = made
    documents = random_documents(lengths, seed)
    of_spans = {"mean_span": 2.0} if unit == "span" else {}
    objective = make(special, rate=0.5, unit=unit, eligible=eligible, **of_spans)
    assert told(objective, documents) == ever_predicted(objective, documents, ahead)


@given(lengths=LENGTHS, loss_on=st.sampled_from(["all", "completion", "replies"]), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_ntp_may_predict_what_it_predicts(lengths, loss_on, seed):
    documents = random_documents(lengths, seed)
    objective = NextTokenPrediction(spec=NtpSpec(loss_on=loss_on))
    assert told(objective, documents) == ever_predicted(objective, documents)


@given(length=st.integers(2, 30), cut=st.data(), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_what_may_be_predicted_in_a_part_of_a_document_may_be_in_all_of_it(length, cut, seed):
    """By this, the end of a long document can show that it has a target."""
    documents = random_documents([length], seed)
    begin = cut.draw(st.integers(0, length - 1))
    end = cut.draw(st.integers(begin + 1, length))
    part = Documents(
        token_ids=documents.token_ids[begin:end],
        offsets=np.array([0, end - begin]),
        source=documents.source,
        id=documents.id,
        piece=documents.piece,
        prompt_length=np.clip(documents.prompt_length - begin, 0, end - begin),
        group=documents.group,
        word_starts=documents.word_starts[begin:end],
        entity_number=documents.entity_number[begin:end],
        is_reply=documents.is_reply[begin:end],
    )
    rules = [
        NextTokenPrediction(spec=NtpSpec(loss_on=loss_on)) for loss_on in ("all", "completion", "replies")
    ]
    rules += [
        bico(unit=unit, eligible=eligible) for unit in UNITS for eligible in ("all", "completion", "replies")
    ]
    for rule in rules:
        (in_part,), (in_all,) = told(rule, part), told(rule, documents)
        assert not [p for p, possible in enumerate(in_part) if possible and not in_all[begin + p]]


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (NextTokenPrediction(spec=NtpSpec()), "a token after the first"),
        (NextTokenPrediction(spec=NtpSpec(loss_on="completion")), "a token after the prompt"),
        (bico(), "a token after the first that is not special"),
        (bico(eligible="completion"), "a token after the prompt that is not special"),
        (bico(unit="entity"), "a token of an entity after the first that is not special"),
    ],
)
def test_a_rule_has_words_for_messages(rule, what):
    assert rule.predicts == what
