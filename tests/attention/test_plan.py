"""The plan: row order, flip indices, refusals, and its life across devices and processes."""

from __future__ import annotations

import pickle
import zlib

import numpy as np
import pytest
import torch

from bico_ds.attention.plan import build_plan


def test_flip_rows_go_backwards_and_leave_out_single_token_documents():
    plan = build_plan("bidirectional", kept_lengths=[3, 1, 4])
    assert plan.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert plan.cu_seqlens.dtype == torch.int32
    assert plan.flip_rows.tolist() == [1, 0, 6, 5, 4]
    assert plan.flip_key_rows.tolist() == [2, 1, 7, 6, 5]
    assert plan.flip_rows.dtype == plan.flip_key_rows.dtype == torch.int64
    assert plan.flip_cu_seqlens.tolist() == [0, 2, 5]
    assert (plan.max_seqlen, plan.flip_max_seqlen, plan.num_kept, plan.num_live) == (4, 3, 8, 0)


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_every_visible_pair_is_counted_once(mode):
    draw = np.random.default_rng()
    kept = draw.integers(1, 20, 7)
    live = np.sort(draw.integers(0, 7, 12)) if mode == "bidirectional" else np.zeros(0, np.int64)
    plan = build_plan(mode, kept_lengths=kept, live_document=live, live_split=np.ones_like(live))
    documents, positions = np.repeat(np.arange(7), kept), np.concatenate([np.arange(n) for n in kept])
    sees = documents[:, None] == documents
    if mode == "causal":
        sees &= positions[:, None] >= positions
    assert plan.num_pairs == sees.sum() + (live[:, None] == documents).sum()


def test_pairs_within_spans_are_counted_once():
    draw = np.random.default_rng()
    kept, spans = draw.integers(1, 20, 7), draw.integers(1, 6, 12)
    live = np.repeat(np.sort(draw.integers(0, 7, 12)), spans)
    given = {"kept_lengths": kept, "live_document": live, "live_split": np.ones_like(live)}
    plan, plain = build_plan("bidirectional", **given, live_spans=spans), build_plan("bidirectional", **given)
    number = np.repeat(np.arange(12), spans)
    sees = (number[:, None] == number) & (np.arange(live.size)[:, None] >= np.arange(live.size))
    assert plan.num_pairs == plain.num_pairs + sees.sum()
    assert plan.span_cu_seqlens.dtype == torch.int32
    assert plan.span_cu_seqlens.diff().tolist() == spans.tolist()
    assert plain.span_cu_seqlens is None


def test_plans_that_differ_in_their_spans_alone_are_told_apart_and_those_without_keep_their_digest():
    given = {"kept_lengths": [5], "live_document": [0, 0, 0], "live_split": [2, 2, 4]}
    digests = [build_plan("bidirectional", **given, live_spans=x).digest for x in (None, [3], [2, 1], [1, 2])]
    assert len(set(digests)) == 4
    recorded = np.array([5, 0, 0, 0, 2, 2, 4], np.int64)
    assert digests[0] == zlib.crc32(recorded.tobytes())


def test_causal_mode_has_no_anti_causal_pass():
    plan = build_plan("causal", kept_lengths=[3, 1, 4])
    assert plan.flip_rows.numel() == 0
    assert plan.flip_max_seqlen == 0


LIVE = {"kept_lengths": [3, 3], "live_document": [0, 0, 1], "live_split": [1, 1, 1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept_lengths": []}, "at least one document"),
        ({"kept_lengths": [3, 0, 2]}, "document 1 .* 0 kept tokens"),
        ({"kept_lengths": [3.0]}, "must hold integers"),
        ({"kept_lengths": [3], "live_document": [0]}, "live_document has 1 entries, live_split has 0"),
        ({"kept_lengths": [3], "live_document": [1], "live_split": [1]}, "must lie in 0 … 0"),
        (
            {"kept_lengths": [3], "live_document": [0], "live_split": [0]},
            "live row 0 of document 0: live_split is 0",
        ),
        (
            {"kept_lengths": [3], "live_document": [0], "live_split": [4]},
            "live_split is 4, must lie in 1 … 3",
        ),
        (
            {"kept_lengths": [3, 3], "live_document": [1, 0], "live_split": [1, 1]},
            "live row 1 is out of order",
        ),
        ({"kept_lengths": [3], "live_document": [0, 0], "live_split": [2, 1]}, "live row 1 is out of order"),
        ({**LIVE, "live_spans": [2, 0, 1]}, "span 1 of live_spans has 0 rows"),
        ({**LIVE, "live_spans": [2]}, "live_spans hold 2 rows, the batch has 3 live ones"),
        ({**LIVE, "live_spans": [1, 2]}, "span 1 of live_spans reaches from document 0 into document 1"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_plan("bidirectional", **arguments)


def test_causal_mode_refuses_live_rows_and_unknown_modes_are_named():
    with pytest.raises(ValueError, match="causal mode has no live placeholders"):
        build_plan("causal", kept_lengths=[3], live_document=[0], live_split=[1])
    with pytest.raises(ValueError, match="'sideways'"):
        build_plan("sideways", kept_lengths=[3])


def test_plan_survives_a_worker_process():
    plan = build_plan("bidirectional", kept_lengths=[5, 1], live_document=[0], live_split=[2])
    twin = pickle.loads(pickle.dumps(plan))
    assert twin.outline == plan.outline
    assert torch.equal(twin.flip_rows, plan.flip_rows)
    assert twin.to("cpu").flip_rows is twin.flip_rows
