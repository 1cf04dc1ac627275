"""Masked fine-tuning's rows against a slow reference, their room in bins, and the texts of the recipe in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.masked_ft import MaskedFtSpec
from bico_ds.data.loading.batch_view import view_batch
from bico_ds.data.loading.sequences import longest_sequence
from bico_ds.data.tokenizer import load_tokenizer, text_ids
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey, TokenRoles, check_batch
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.masked_ft import MaskedFineTuning
from bico_ds.objectives.masks import TokenGrid
from tests.objectives.bico_reference import read_back
from tests.objectives.test_objectives import BOS, EOS, make_documents
from tests.objectives.test_possible_targets import told

KEY = BatchKey(seed=5, epoch=0)
MASK, TEXTS = 999, {"restore": (7, 8, 9), "text": (5,)}
ROLES = TokenRoles(special_ids=(BOS, EOS), placeholder_id=0, vocabulary=1000, encode=lambda text: TEXTS[text])


def masked_ft(**keys) -> MaskedFineTuning:
    spec = MaskedFtSpec.model_validate(
        {"mask_id": MASK, "instruction": "restore", "separator": "text", **keys}
    )
    (objective,) = build_objectives([spec], ROLES)
    return objective


def masks_of(objective: MaskedFineTuning, documents: Documents, key: BatchKey = KEY) -> list[list[bool]]:
    masked = objective.policy.draw(documents, TokenGrid.of(documents), key)
    return [part.tolist() for part in np.split(masked, documents.offsets[1:-1])]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    texts=st.sampled_from([{}, {"instruction": ""}, {"separator": ""}, {"instruction": "", "separator": ""}]),
    unit=st.sampled_from(["token", "span", "word", "entity"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_a_row_is_instruction_masked_copy_separator_and_the_text_that_is_predicted(
    lengths, texts, unit, seed
):
    documents, objective = (
        make_documents(lengths, seed),
        masked_ft(mask={"rate": [0, 1], "unit": unit}, **texts),
    )
    batch = objective.build(documents, KEY)
    check_batch(batch, documents, room=int(objective.expand(documents.lengths).sum()), vocabulary=1000)
    assert batch.plan.mode == "causal"
    assert batch.represented_tokens == sum(lengths)
    assert told(objective, documents) == [[True] * length for length in lengths]
    masks = masks_of(objective, documents)
    for document, masked, read in zip(documents, masks, read_back(batch), strict=True):
        tokens = document.token_ids.tolist()
        copy = [MASK if hidden else token for token, hidden in zip(tokens, masked, strict=True)]
        instruction, separator = (
            TEXTS.get(getattr(objective.spec, key), ()) for key in ("instruction", "separator")
        )
        before = [*instruction, *copy, *separator]
        assert read["kept"] == [(token, i) for i, token in enumerate([*before, *tokens])]
        assert read["predictions"] == {len(before) - 1 + i: token for i, token in enumerate(tokens)}
        assert [
            token for token, hidden in zip(tokens, masked, strict=True) if hidden and token in (BOS, EOS)
        ] == []


def test_mask_and_rate_are_fresh_for_each_document_and_epoch():
    documents, objective = make_documents([402] * 200), masked_ft()
    share = {
        epoch: np.mean(masks_of(objective, documents, BatchKey(seed=5, epoch=epoch)), axis=1)
        for epoch in (0, 1)
    }
    for shares in share.values():
        assert np.histogram(shares, bins=4, range=(0, 1))[0] == pytest.approx(50, abs=28)
    assert np.corrcoef(share[0], share[1])[0, 1] == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize("mask", [{}, {"unit": "span"}, {"eligible": "completion"}], ids=str)
def test_a_mask_without_a_rate_keeps_the_uniform_one(mask):
    spec = MaskedFtSpec.model_validate({"mask": mask})
    assert spec.mask.rate == (0.0, 1.0)
    assert spec.identity().get("mask", {}) == mask
    assert MaskedFtSpec.model_validate({"mask": {**mask, "rate": 0.15}}).mask.rate == 0.15


def test_the_cost_is_that_of_the_batches():
    documents = make_documents([1, 2, 9, 30])
    objective = masked_ft(instruction="", separator="")
    batch, cost = objective.build(documents, KEY), objective.spec.cost(documents.lengths)
    assert cost.kept_rows.tolist() == np.diff(batch.plan.cu_seqlens).tolist()
    assert cost.pairs.sum() == batch.plan.num_pairs
    assert cost.head_rows.sum() == len(batch.targets)
    assert not cost.live_rows.any()
    assert masked_ft().spec.cost(np.array([9])).kept_rows == 2 * 9 + 2 + 1  # four bytes are a token


def test_the_longest_text_is_the_one_that_fits_with_all_that_is_added():
    expand = masked_ft().expand  # 2 L + 4
    assert longest_sequence(expand, 64) == 30
    assert longest_sequence(expand, 8) == 2
    with pytest.raises(
        UserError, match=r"data\.capacity is 7: too small for a document of 2 tokens .* make 8 of it"
    ):
        longest_sequence(expand, 7)


def test_a_shown_batch_has_every_row_in_order_as_a_kept_token():
    documents, objective = make_documents([9, 1, 20]), masked_ft()
    batch = objective.build(documents, KEY)
    for view, read in zip(view_batch(batch), read_back(batch), strict=True):
        assert [(token.token, token.position) for token in view.tokens] == read["kept"]
        assert {token.state for token in view.tokens} == {"kept"}
        assert {t.position: t.predicts for t in view.tokens if t.predicts is not None} == read["predictions"]


def test_the_identity_has_the_ids_that_the_texts_became():
    identity = masked_ft(mask={"rate": 0.4}).identity()
    assert identity["mask"] == {"rate": 0.4} and identity["mask_id"] == MASK
    assert (identity["instruction_ids"], identity["separator_ids"]) == ([7, 8, 9], [5])
    assert "mask" not in masked_ft().identity()


@pytest.mark.parametrize(
    ("keys", "roles", "message"),
    [
        (
            {},
            {"placeholder_id": None},
            r"objectives\[0\]\.mask_id is not given, and the tokenizer has no unk",
        ),
        ({"mask_id": 1000}, {}, r"objectives\[0\]\.mask_id: 1000 is past the vocabulary"),
        (
            {"instruction": "restore"},
            {"encode": lambda text: (3, 1000)},
            r"objectives\[0\]\.instruction: the tokenizer gives id 1000, and the model's vocabulary has 1000",
        ),
        (
            {"separator": "\n"},
            {"encode": lambda text: ()},
            r"objectives\[0\]\.separator: the tokenizer makes no token of '\\n': leave it out",
        ),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused_by_their_key(keys, roles, message):
    known = {"special_ids": (), "placeholder_id": 0, "vocabulary": 1000, **roles}
    with pytest.raises(UserError, match=message):
        build_objectives([MaskedFtSpec(**keys)], TokenRoles(**known))


def test_a_recipe_s_text_becomes_its_ids_and_a_word_that_has_none_is_named(
    bpe_tokenizer: str, word_tokenizer: str
):
    tokenizer = load_tokenizer(Path(bpe_tokenizer))
    ids = text_ids(tokenizer, "Restore the text: ")
    assert tokenizer.decode(ids) == "Restore the text: "
    assert tokenizer.bos_token_id not in ids
    tokenizer = load_tokenizer(Path(word_tokenizer))
    known = next(word for word in tokenizer.get_vocab() if word.isalpha())
    assert text_ids(tokenizer, known) == (tokenizer.get_vocab()[known],)
    roles = TokenRoles(
        special_ids=(), placeholder_id=0, vocabulary=1000, encode=lambda text: text_ids(tokenizer, text)
    )
    with pytest.raises(
        UserError, match=r"objectives\[0\]\.separator: .*no token for 'unheard-of' in the text"
    ):
        build_objectives([MaskedFtSpec(separator=f"{known} unheard-of")], roles)
