"""NTP and BICO batches against a slow reference, and what masks may depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.documents import Document, Documents
from bico_ds.objectives.base import BatchKey, TokenRoles
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.masks import TokenGrid
from bico_ds.objectives.ntp import NextTokenPrediction
from bico_ds.objectives.schedule import ObjectiveSchedule
from tests.objectives.bico_reference import bico_document, read_back

BOS, EOS, PLACEHOLDER = 1, 2, 0
KEY = BatchKey(seed=5, epoch=0)
UNITS = ("token", "span", "word", "entity")


def make_documents(lengths: list[int], seed: int = 0, first_id: int = 0) -> Documents:
    """Random documents between BOS and EOS, with words, entities, and a prompt in front."""
    rng, of_replies = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    documents = []
    for index, length in enumerate(lengths):
        tokens = rng.integers(3, 1000, length)
        tokens[0] = BOS
        tokens[-1] = EOS if length > 1 else BOS
        start = int(rng.integers(0, length))
        documents.append(
            Document(
                token_ids=tokens,
                source=int(rng.integers(0, 3)),
                id=first_id + index,
                prompt_length=int(rng.integers(0, length + 1)),
                word_starts=rng.random(length) < 0.5,
                entity_spans=np.array([[start, int(rng.integers(start, length)) + 1]]),
                is_reply=of_replies.random(length) < 0.4,
            )
        )
    return Documents.of(documents)


def bico(special_ids=(BOS, EOS), **mask) -> MaskDenoising:
    spec = BicoSpec(mask=MaskSpec(**mask))
    return MaskDenoising(spec=spec, placeholder_id=PLACEHOLDER, special_ids=special_ids)


def drawn(objective: MaskDenoising, documents: Documents, key: BatchKey = KEY) -> list[list[bool]]:
    masked = objective.policy.draw(documents, TokenGrid.of(documents), key)
    return [part.tolist() for part in np.split(masked, documents.offsets[1:-1])]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    rate=st.sampled_from([0.15, 0.5, 1.0, (0.0, 1.0)]),
    unit=st.sampled_from(UNITS),
    eligible=st.sampled_from(["all", "completion", "replies"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_bico_batch_equals_the_slow_reference(lengths, rate, unit, eligible, seed):
    documents = make_documents(lengths, seed)
    objective = bico(rate=rate, unit=unit, eligible=eligible)
    batch = objective.build(documents, KEY)
    expected = [
        bico_document(document.token_ids.tolist(), masked, PLACEHOLDER)
        for document, masked in zip(documents, drawn(objective, documents), strict=True)
    ]
    assert read_back(batch) == expected
    assert batch.represented_tokens == sum(lengths)
    assert batch.documents.tolist() == [[d.source, d.id, d.piece] for d in documents]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    unit=st.sampled_from(UNITS),
    eligible=st.sampled_from(["all", "completion", "replies"]),
    special=st.sampled_from([(BOS, EOS), ()]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_first_and_special_and_ineligible_tokens_are_never_masked(lengths, unit, eligible, special, seed):
    documents = make_documents(lengths, seed)
    masks = drawn(bico(special, rate=1.0, unit=unit, eligible=eligible), documents)
    for document, masked in zip(documents, masks, strict=True):
        for position, hidden in enumerate(masked):
            inside = any(start <= position < end for start, end in document.entity_spans)
            may = position > 0 and document.token_ids[position] not in special
            may &= eligible != "completion" or position >= document.prompt_length
            may &= eligible != "replies" or bool(document.is_reply[position])
            may &= unit != "entity" or inside
            assert hidden == may  # at rate 1 everything that may be masked is


@pytest.mark.parametrize("unit", UNITS)
def test_mask_depends_only_on_seed_epoch_and_document(unit):
    documents = make_documents([50, 9, 33, 20, 41], seed=3)
    objective = bico(rate=(0.2, 0.8), unit=unit)
    together = drawn(objective, documents)
    singles = list(documents)
    for order in ([3], [4, 2], [1, 0, 3]):
        apart = drawn(objective, Documents.of([singles[i] for i in order]))
        assert apart == [together[i] for i in order]
    assert drawn(objective, documents, BatchKey(seed=6, epoch=0)) != together
    assert drawn(objective, documents, BatchKey(seed=5, epoch=1)) != together
    epochs = np.array([0, 1, 0, 1, 0])
    mixed = drawn(objective, documents, BatchKey(seed=5, epoch=epochs))
    later = drawn(objective, documents, BatchKey(seed=5, epoch=1))
    assert mixed == [(later if e else together)[i] for i, e in enumerate(epochs)]


def test_pieces_of_one_document_have_their_own_draws():
    tokens = np.arange(10, 410)
    pieces = Documents.of([Document(token_ids=tokens, source=0, id=7, piece=piece) for piece in (0, 1)])
    first, second = drawn(bico(rate=0.5), pieces)
    agreement = np.mean(np.array(first[1:]) == np.array(second[1:]))
    assert 0.4 < agreement < 0.6


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.4, 0.9])
@pytest.mark.parametrize("unit", ["token", "span", "word"])
def test_the_share_of_masked_tokens_is_the_rate(unit, rate):
    rng = np.random.default_rng(0)
    documents = Documents.of(
        [
            Document(
                token_ids=np.full(1001, 9),
                source=0,
                id=i,
                word_starts=rng.random(1001) < 0.5,
                entity_spans=np.zeros((0, 2)),
            )
            for i in range(300)
        ]
    )
    share = np.mean([np.mean(masked[1:]) for masked in drawn(bico(rate=rate, unit=unit), documents)])
    assert share == pytest.approx(rate, abs=0.01)


def test_spans_have_geometric_lengths_of_the_asked_mean():
    documents = Documents.of([Document(token_ids=np.full(2000, 9), source=0, id=i) for i in range(200)])
    flat = np.concatenate([[*m, False] for m in drawn(bico(rate=0.2, unit="span", mean_span=4.0), documents)])
    edges = np.diff(np.concatenate([[0], flat.astype(int), [0]]))
    lengths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    assert lengths.mean() == pytest.approx(4.0, rel=0.03)
    assert np.mean(lengths == 1) == pytest.approx(0.25, abs=0.01)  # geometric: P(1) = 1 / mean
    assert np.mean(lengths[lengths > 1] == 2) == pytest.approx(0.25, abs=0.01)  # and memoryless


def test_rates_are_uniform_in_their_range_for_each_document():
    documents = make_documents([5] * 4000)
    rates = bico(rate=(0.2, 0.6)).policy.rates(documents, KEY)
    assert np.all((rates >= 0.2) & (rates < 0.6))
    assert np.histogram(rates, bins=4, range=(0.2, 0.6))[0] == pytest.approx(1000, abs=120)


@pytest.mark.parametrize("unit", ["word", "entity"])
def test_a_chosen_unit_is_masked_whole(unit):
    documents = make_documents([60] * 40, seed=4)
    for document, masked in zip(documents, drawn(bico(rate=0.5, unit=unit), documents), strict=True):
        starts = sorted({0, *np.flatnonzero(document.word_starts)})
        units = zip(starts, [*starts[1:], 60], strict=True) if unit == "word" else document.entity_spans
        for start, end in units:
            maskable = [masked[p] for p in range(start, end) if p > 0 and document.token_ids[p] > EOS]
            assert len(set(maskable)) <= 1


def test_each_of_a_documents_entities_is_masked_by_itself_at_the_rate():
    spans = np.array([[1, 3], [5, 6], [6, 10], [12, 15]])
    documents = Documents.of(
        [Document(token_ids=np.full(16, 9), source=0, id=i, entity_spans=spans) for i in range(3000)]
    )
    masks = np.array(drawn(bico(rate=0.3, unit="entity"), documents))
    fates = np.stack([masks[:, start] for start, _ in spans], axis=1)
    inside = np.zeros(16, dtype=bool)
    for (start, end), fate in zip(spans, fates.T, strict=True):
        assert (masks[:, start:end] == fate[:, None]).all()
        inside[start:end] = True
    assert not masks[:, ~inside].any()
    assert fates.mean(axis=0) == pytest.approx(0.3, abs=0.04)
    assert np.corrcoef(fates.T) == pytest.approx(np.eye(4), abs=0.1)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    loss_on=st.sampled_from(["all", "completion", "replies"]),
)
@settings(max_examples=40, deadline=None)
def test_ntp_predicts_the_next_token_and_never_across_documents(lengths, loss_on):
    documents = make_documents(lengths, sum(lengths))
    batch = NextTokenPrediction(spec=NtpSpec(loss_on=loss_on)).build(documents, KEY)
    for document, read in zip(documents, read_back(batch), strict=True):
        tokens = document.token_ids.tolist()
        first = document.prompt_length if loss_on == "completion" else 0
        assert read["kept"] == [(token, i) for i, token in enumerate(tokens)]
        assert read["live"] == []
        counts = [loss_on != "replies" or bool(reply) for reply in document.is_reply]
        assert read["predictions"] == {
            i: tokens[i + 1] for i in range(len(tokens) - 1) if i + 1 >= first and counts[i + 1]
        }
    assert batch.plan.mode == "causal"


def test_an_empty_document_is_named():
    documents = Documents.of(
        [
            Document(token_ids=np.arange(3), source=0, id=1),
            Document(token_ids=np.array([], int), source=2, id=7),
        ]
    )
    for objective in (NextTokenPrediction(spec=NtpSpec()), bico()):
        with pytest.raises(ValueError, match="document 7 of source 2 has no tokens"):
            objective.build(documents, KEY)


@pytest.mark.parametrize(("unit", "missing"), [("word", "word starts"), ("entity", "without entities")])
def test_a_policy_whose_column_is_missing_never_masks_by_something_else(unit, missing):
    documents = Documents.of([Document(token_ids=np.arange(3), source=0, id=1)])
    with pytest.raises(AssertionError, match=missing):
        bico(unit=unit).build(documents, KEY)


def test_schedule_is_a_function_of_seed_and_step_with_the_asked_shares():
    objectives = build_objectives(
        [
            NtpSpec(kind="ntp", probability=0.3),
            BicoSpec(kind="bico", probability=0.5),
            BicoSpec(kind="bico", probability=0.2),
        ],
        TokenRoles(special_ids=(BOS, EOS), placeholder_id=0, vocabulary=1000),
    )
    assert [objective.name for objective in objectives] == ["ntp", "bico", "bico_2"]
    schedule = ObjectiveSchedule(objectives, [0.3, 0.5, 0.2], seed=1)
    indices = schedule.indices(0, 20000)
    assert np.bincount(indices) / 20000 == pytest.approx([0.3, 0.5, 0.2], abs=0.02)
    assert [schedule(step).name for step in range(50, 60)] == [objectives[i].name for i in indices[50:60]]
    assert (ObjectiveSchedule(objectives, [0.3, 0.5, 0.2], seed=2).indices(0, 100) != indices[:100]).any()


def test_bico_without_any_placeholder_id_is_refused():
    with pytest.raises(UserError, match=r"objectives\[0\]\.placeholder_id"):
        build_objectives([BicoSpec()], TokenRoles(special_ids=(), placeholder_id=None, vocabulary=1000))
