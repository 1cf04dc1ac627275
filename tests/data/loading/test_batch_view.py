"""What is shown of a batch is what the objective was given."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from bico_ds.config.objectives.abi import AbiSpec
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.config.objectives.mlm_u import MlmUSpec
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.data.loading.batch_view import plot_visibility, print_batch, view_batch, visibility
from bico_ds.documents import Document, Documents
from bico_ds.objectives.abi import BlankInfilling
from bico_ds.objectives.base import BatchKey, TokenRoles
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.masks import TokenGrid
from bico_ds.objectives.ntp import NextTokenPrediction

HALF = BicoSpec(mask=MaskSpec(rate=0.5))


@pytest.fixture
def documents() -> Documents:
    rng = np.random.default_rng(0)
    return Documents.of(
        [Document(token_ids=rng.integers(10, 99, n), source=0, id=i) for i, n in enumerate((9, 1, 20, 5))]
    )


def test_the_view_gives_back_every_token_with_its_state(documents):
    objective, key = MaskDenoising(spec=HALF, placeholder_id=0), BatchKey(seed=1, epoch=0)
    views = view_batch(objective.build(documents, key))
    masked = np.split(objective.policy.draw(documents, TokenGrid.of(documents), key), documents.offsets[1:-1])
    for document, view, hidden in zip(documents, views, masked, strict=True):
        tokens = document.token_ids.tolist()
        assert [token.token for token in view.tokens] == tokens
        follows = [*hidden[1:], False]
        states = ["kept" if not m else "live" if n else "dead" for m, n in zip(hidden, follows, strict=True)]
        assert [token.state for token in view.tokens] == states
        assert [token.predicts for token in view.tokens] == [
            tokens[i + 1] if follows[i] else None for i in range(len(tokens))
        ]
        seen = visibility(view, "bidirectional")
        for query in range(len(tokens)):
            for other in range(len(tokens)):
                expected = 0 if hidden[other] else 1 if other <= query else 2
                assert seen[query, other] == (-1 if states[query] == "dead" else expected)


def test_tokens_that_are_predicted_at_their_own_rows_are_shown_there(documents):
    spec = BicoSpec(mask=MaskSpec(rate=0.5), predict="same")
    objective, key = MaskDenoising(spec=spec, placeholder_id=0), BatchKey(seed=1, epoch=0)
    masked = np.split(objective.policy.draw(documents, TokenGrid.of(documents), key), documents.offsets[1:-1])
    for document, view, hidden in zip(
        documents, view_batch(objective.build(documents, key)), masked, strict=True
    ):
        tokens = document.token_ids.tolist()
        assert [token.token for token in view.tokens] == tokens
        assert [token.state for token in view.tokens] == ["live" if m else "kept" for m in hidden]
        assert [token.predicts for token in view.tokens] == [
            token if m else None for token, m in zip(tokens, hidden, strict=True)
        ]


@pytest.mark.parametrize("spans", ["separate", "left_to_right"])
def test_rows_of_blanks_are_shown_with_what_they_see_of_blanks(documents, spans):
    objective = BlankInfilling(spec=AbiSpec(mask=MaskSpec(rate=0.6), spans=spans))
    key = BatchKey(seed=1, epoch=0)
    masked = np.split(objective.policy.draw(documents, TokenGrid.of(documents), key), documents.offsets[1:-1])
    for document, view, hidden in zip(
        documents, view_batch(objective.build(documents, key)), masked, strict=True
    ):
        assert [token.token for token in view.tokens] == document.token_ids.tolist()
        # A masked token's run is named by the last kept token before it.
        run = np.maximum.accumulate(np.where(hidden, 0, np.arange(len(hidden))))
        seen = visibility(view, "bidirectional")
        for query, other in np.ndindex(*seen.shape):
            has_row = (
                not hidden[query]
                or spans == "left_to_right"
                or hidden[query : query + 2].tolist() == [True, True]
            )
            expected = 1 if other <= query else 2
            if hidden[other]:
                together = hidden[query] and (spans == "left_to_right" or run[query] == run[other])
                expected = int(together and other <= query)
            assert seen[query, other] == (expected if has_row else -1)


def test_ntp_views_are_causal(documents):
    batch = NextTokenPrediction(spec=NtpSpec()).build(documents, BatchKey(seed=1, epoch=0))
    for view in view_batch(batch):
        assert {token.state for token in view.tokens} == {"kept"}
        assert np.array_equal(visibility(view, "causal"), np.tri(len(view.tokens)))


def test_it_prints_and_draws(documents, tmp_path):
    batch = MaskDenoising(spec=HALF, placeholder_id=0).build(documents, BatchKey(seed=1, epoch=0))
    out = io.StringIO()
    print_batch(
        Console(file=out, width=160),
        batch,
        lambda token: f"t{token}",
        source_names=["books"],
        taken=35,
        room=40,
        most_documents=3,
        most_tokens=8,
    )
    text = out.getvalue()
    assert "35 of 40 tokens (fill 87.5%)" in text
    assert "books #2" in text
    assert "12 more tokens" in text
    assert "1 more documents" in text
    plot_visibility(
        view_batch(batch)[0], "bidirectional", lambda token: f"${token}", tmp_path / "a" / "v.png"
    )
    assert (tmp_path / "a" / "v.png").stat().st_size > 5000


def test_weights_are_shown_where_a_batch_has_them(documents):
    for spec, shown in ((MlmUSpec(), True), (MlmUSpec(predict="next"), True), (HALF, False)):
        (objective,) = build_objectives([spec], TokenRoles(special_ids=(), placeholder_id=0, vocabulary=99))
        batch, out = objective.build(documents, BatchKey(seed=1, epoch=0)), io.StringIO()
        print_batch(
            Console(file=out, width=160), batch, str,
            source_names=["books"], taken=35, room=40, most_documents=9, most_tokens=99,
        )  # fmt: skip
        text = " ".join(out.getvalue().split())
        assert ("weight" in text) == shown
        if shown:
            documents_with_any = sum(
                any(token.predicts for token in view.tokens) for view in view_batch(batch)
            )
            assert f"predictions of weight {documents_with_any} in all" in text
            assert all(f"{weight:.3g}" in text for weight in batch.loss_weights.tolist())


def test_a_name_with_brackets_is_shown_as_it_is(documents):
    batch = NextTokenPrediction(spec=NtpSpec()).build(documents, BatchKey(seed=1, epoch=0))
    out = io.StringIO()
    print_batch(
        Console(file=out, width=160), batch, str,
        source_names=["[bold]books[/]"], taken=35, room=40, most_documents=1, most_tokens=1,
    )  # fmt: skip
    assert "[bold]books[/] #0" in out.getvalue()
