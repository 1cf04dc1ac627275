"""What the Triton ops state on the meta device: launches and bytes, against a sum done by hand; and shapes and dtypes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bico_ds.attention.backends import resolve
from bico_ds.attention.layout import build_layout
from bico_ds.attention.packed import packed_attention
from bico_ds.attention.plan import build_plan
from bico_ds.common.traffic import Traffic, counting_traffic

META = torch.device("meta")
H, N, D = 8, 2, 64


def run_on_meta(plan, dtype=torch.bfloat16):
    """out and gradients of q, k, v."""
    layout = build_layout(plan, resolve("triton", dtype, D, META).policy).to(META)
    make = partial(torch.empty, dtype=dtype, device=META)
    q, k, v = (make(plan.num_rows, heads, D, requires_grad=True) for heads in (H, N, N))
    cos, sin = make(plan.num_rows, D), make(plan.num_rows, D)
    out = packed_attention(q, k, v, cos, sin, plan.to(META), backend="triton", layout=layout)
    return out, *torch.autograd.grad(out, (q, k, v), torch.empty_like(out))


PLANS = {
    "causal": build_plan("causal", kept_lengths=[30, 20]),
    "bidirectional": build_plan("bidirectional", kept_lengths=[30, 20]),
    "with live rows": build_plan(
        "bidirectional", kept_lengths=[27, 20], live_document=[0, 0, 1], live_split=[2, 5, 20]
    ),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_meta_run_gives_the_shapes_and_dtypes_and_states_each_op_once(plan):
    with counting_traffic() as calls:
        out, *grads = run_on_meta(plan)
    assert out.shape == (50, H, D) and out.dtype == torch.bfloat16
    assert [(g.shape, g.dtype) for g in grads] == [((50, h, D), torch.bfloat16) for h in (H, N, N)]
    assert [call.op for call in calls] == ["attention forward", "attention backward"]
    run_on_meta(plan)
    assert len(calls) == 2, "what runs outside is not counted"


def test_the_traffic_is_that_of_a_sum_by_hand():
    """50 rows, 47 of them kept; 8 query and 2 key heads of 64; bf16.

    Bytes: q, out, grad, dq 51,200 each; kept k, v, dk, dv 12,032 each; rotated both ways twice as much. cos and sin: half
    of each, 6,400 for all rows and 6,016 for the kept ones. lse: 1,600, as delta. Index table: 400. A block of queries
    for each document, 32 bytes in all, and one of keys, 56.
    """
    with counting_traffic() as calls:
        run_on_meta(PLANS["with live rows"])
    rotating = 12_032 + 6_016
    forward = Traffic(
        op="attention forward",
        launches=2,
        bytes_read=rotating + 51_200 + 6_400 + 24_064 + 12_032 + 400 + 32,
        bytes_written=24_064 + 51_200 + 1_600,
    )
    queries_read = 3 * 51_200 + 6_400 + 24_064 + 12_032 + 1_600 + 400 + 32
    keys_read = 102_400 + 51_200 + 24_064 + 12_032 + 6_016 + 2 * 1_600 + 400 + 56
    queries_written = 51_200 + 102_400 + 2 * 1_600
    backward = Traffic(
        op="attention backward",
        launches=5,  # two of them clear the gradients of 3 live rows
        bytes_read=rotating + queries_read + keys_read,
        bytes_written=24_064 + queries_written + 2 * 12_032 + 2 * 3 * 2 * 64 * 2,
    )
    assert calls == [forward, backward]


def test_counters_may_be_nested():
    with counting_traffic() as outer:
        run_on_meta(PLANS["causal"])
        with counting_traffic() as inner:
            run_on_meta(PLANS["causal"])
    assert (len(outer), len(inner)) == (4, 2)
    assert outer[:2] == inner
