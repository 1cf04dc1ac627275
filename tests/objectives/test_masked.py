"""Objectives that predict masked tokens besides BICO's own way, against a slow reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.abi import AbiSpec
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.mlm_u import MlmUSpec
from bico_ds.config.objectives.table import read_spec
from bico_ds.documents import Document, Documents
from bico_ds.objectives.abi import BlankInfilling
from bico_ds.objectives.base import BatchKey, TokenRoles
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.masked import MaskedObjective
from bico_ds.objectives.mlm_u import UniformRateDenoising
from tests.data.stores import write_store
from tests.objectives.masked_reference import (
    in_place_document,
    infilling_document,
    next_document,
    read_masked,
)
from tests.objectives.test_objectives import BOS, EOS, KEY, PLACEHOLDER, UNITS, bico, drawn, make_documents

TOKENS = TokenRoles(special_ids=(BOS, EOS), placeholder_id=PLACEHOLDER, vocabulary=1000)


def in_place(special_ids=(BOS, EOS), **mask) -> MaskDenoising:
    spec = BicoSpec(mask=MaskSpec(**mask), predict="same")
    return MaskDenoising(spec=spec, placeholder_id=PLACEHOLDER, special_ids=special_ids)


def infilling(special_ids=(BOS, EOS), spans="separate", **mask) -> BlankInfilling:
    return BlankInfilling(spec=AbiSpec(mask=MaskSpec(**mask), spans=spans), special_ids=special_ids)


def uniform_rate(special_ids=(BOS, EOS), **keys) -> UniformRateDenoising:
    return UniformRateDenoising(spec=MlmUSpec(**keys), placeholder_id=PLACEHOLDER, special_ids=special_ids)


def references(objective: MaskedObjective, documents: Documents, key: BatchKey = KEY) -> list[dict]:
    def reference(tokens: list[int], masked: list[bool]) -> dict:
        if isinstance(objective, BlankInfilling):
            left_to_right = objective.spec.spans == "left_to_right"
            return infilling_document(tokens, masked, left_to_right=left_to_right)
        of_predict = {"same": in_place_document, "next": next_document}
        return of_predict[objective.spec.predict](tokens, masked, PLACEHOLDER)

    return [
        reference(document.token_ids.tolist(), masked)
        for document, masked in zip(documents, drawn(objective, documents, key), strict=True)
    ]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    make=st.sampled_from([in_place, infilling, lambda **mask: infilling(spans="left_to_right", **mask)]),
    rate=st.sampled_from([0.15, 0.5, 1.0, (0.0, 1.0)]),
    unit=st.sampled_from(UNITS),
    eligible=st.sampled_from(["all", "completion"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_a_batch_equals_the_slow_reference(lengths, make, rate, unit, eligible, seed):
    documents = make_documents(lengths, seed)
    objective = make(rate=rate, unit=unit, eligible=eligible)
    batch = objective.build(documents, KEY)
    assert read_masked(batch) == references(objective, documents)
    assert batch.represented_tokens == sum(lengths)
    assert batch.documents.tolist() == [[d.source, d.id, d.piece] for d in documents]
    assert batch.loss_weights is None


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    predict=st.sampled_from(["same", "next"]),
    unit=st.sampled_from(["token", "word", "entity"]),
    eligible=st.sampled_from(["all", "completion"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_a_batch_at_uniform_rates_equals_the_slow_reference_and_its_documents_count_alike(
    lengths, predict, unit, eligible, seed
):
    documents = make_documents(lengths, seed)
    objective = uniform_rate(predict=predict, unit=unit, eligible=eligible)
    batch = objective.build(documents, KEY)
    expected = references(objective, documents)
    assert read_masked(batch) == expected
    counts = [len(document["predictions"]) for document in expected]
    weights = [1 / count for count in counts for _ in range(count)]
    assert batch.loss_weights.dtype == torch.float32
    assert batch.loss_weights.tolist() == pytest.approx(weights, rel=1e-7)


def test_a_document_at_uniform_rates_has_any_number_of_masked_tokens_alike():
    documents = Documents.of([Document(token_ids=np.full(11, 9), source=0, id=i) for i in range(20_000)])
    counts = np.array([sum(masked) for masked in drawn(uniform_rate(), documents)])
    # The integral of the binomial distribution over all rates: each of 0 … 10 is as likely.
    assert np.bincount(counts, minlength=11) / 20_000 == pytest.approx(1 / 11, abs=0.01)


def test_masks_are_those_of_bico_with_the_same_keys():
    documents = make_documents([50, 9, 33, 20, 41])
    expected = drawn(bico(rate=0.4, unit="span"), documents)
    assert drawn(infilling(rate=0.4, unit="span"), documents) == expected
    assert drawn(in_place(rate=0.4, unit="span"), documents) == expected
    assert drawn(uniform_rate(), documents) == drawn(bico(rate=(0.0, 1.0)), documents)


def test_the_present_way_is_the_default_and_no_new_identity():
    assert BicoSpec(predict="next").identity() == {"kind": "bico", "version": 1}
    assert BicoSpec(predict="same").identity() == {"kind": "bico", "version": 1, "predict": "same"}
    assert MlmUSpec(predict="next").identity() == {"kind": "mlm_u", "version": 1, "predict": "next"}
    spec = read_spec({"kind": "abi", "spans": "left_to_right", "mask": {"rate": 0.3}})
    (objective,) = build_objectives([spec], replace(TOKENS, placeholder_id=None))
    assert objective.identity() == {
        "kind": "abi", "version": 1, "spans": "left_to_right", "mask": {"rate": 0.3}, "special_ids": [BOS, EOS]
    }  # fmt: skip
    (objective,) = build_objectives([MlmUSpec()], TOKENS)
    assert objective.identity() == {
        "kind": "mlm_u", "version": 1, "special_ids": [BOS, EOS], "placeholder_id": PLACEHOLDER
    }  # fmt: skip


def test_blank_infilling_needs_no_placeholder_and_a_uniform_rate_does():
    without = replace(TOKENS, placeholder_id=None)
    assert build_objectives([AbiSpec()], without)[0].name == "abi"
    with pytest.raises(UserError, match=r"objectives\[0\]\.placeholder_id is not given"):
        build_objectives([MlmUSpec()], without)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "mlm_u", "unit": "entity"}, r"objectives\[0\]\.unit is 'entity', but .* no entity spans"),
        ({"kind": "mlm_u", "eligible": "completion"}, r"objectives\[0\]\.eligible is 'completion'"),
        ({"kind": "abi", "mask": {"unit": "entity"}}, r"objectives\[0\]\.mask\.unit is 'entity'"),
        ({"kind": "abi", "mask": {"eligible": "completion"}}, r"objectives\[0\]\.mask\.eligible is"),
    ],
)  # fmt: skip
def test_a_store_that_marks_nothing_to_mask_is_refused_by_the_recipe_s_key(tmp_path, entry, message):
    store = write_store(tmp_path / "plain", [9] * 4, prompt_lengths=np.zeros(4, np.int64))
    (objective,) = build_objectives([read_spec(entry)], TOKENS)
    with pytest.raises(UserError, match=message):
        objective.check(store)


def test_the_batch_of_a_uniform_rate_without_a_masked_token_has_no_weight():
    documents = make_documents([1, 2, 1])
    batch = uniform_rate().build(documents, KEY)
    assert batch.loss_weights.shape == batch.targets.shape == (0,)
