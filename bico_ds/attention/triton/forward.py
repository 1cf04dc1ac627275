"""The forward kernel: one online softmax over both directions of a document.

Rows, splits and blocks are those of `RowBlocks`. K holds the batch's kept keys, rotated: [DIRECTIONS, N, num_kept, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from bico_ds.attention.triton.primitives import (
    LN2,
    LOG2E,
    load_halves,
    load_query_block,
    load_rotated,
    load_rows,
    meets,
    rows_again,
    store_rows,
)


@triton.jit
def _attend(
    peak, total, acc, r1, r2, split, K, V, v_row, keys, begin, end,
    REVERSE: tl.constexpr, MIXED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One sweep of the online softmax over keys [begin, end) of the document, whose first ones are at K and V.

    MIXED: some rows take some of these keys in the other direction.
    """
    for start in range(begin, end, KEYS):
        j = start + tl.arange(0, KEYS)
        there = j < keys
        k1, k2 = load_halves(K, j.to(tl.int64) * D, there, D, HALF)
        scores = tl.dot(r1, tl.trans(k1))
        scores = tl.dot(r2, tl.trans(k2), scores)
        if MIXED:
            scores = tl.where(meets(split[:, None], j[None, :], REVERSE), scores, -float("inf"))
        if REVERSE:  # the forward direction ends before the document does
            scores = tl.where(there[None, :], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(V, j.to(tl.int64) * v_row, there, D, HALF)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        peak = higher
    return peak, total, acc


@triton.jit(do_not_specialize=("num_kept", "lse_head"))
def forward_kernel(
    Q, K, V, COS, SIN, ROWS, SPLIT, BLOCKS, OUT, LSE, softmax_scale, num_kept, q_row, v_row, lse_row, lse_head,
    DIRECTIONS: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """OUT [T, H, D] and LSE [T, H], of any strides, of a block of query rows, one head."""
    head, entries, there, rows, split, key0, low, high, keys = load_query_block(
        ROWS, SPLIT, BLOCKS, H, BLOCK, KEYS
    )
    key_head = head // (H // N)
    K += (tl.cast(key_head, tl.int64) * num_kept + key0) * D
    V += tl.cast(key0, tl.int64) * v_row + key_head * D
    scale = softmax_scale * LOG2E
    # A finite start: rows that have seen no key yet need no care.
    peak = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, 2 * HALF], tl.float32)
    r1, r2 = load_rotated(Q, rows * q_row + head * D, COS, SIN, rows, there, scale, False, D, HALF)
    peak, total, acc = _attend(
        peak, total, acc, r1, r2, split, K, V, v_row, keys, 0, low, False, False, D, HALF, KEYS
    )
    peak, total, acc = _attend(
        peak, total, acc, r1, r2, split, K, V, v_row, keys, low, high, False, True, D, HALF, KEYS
    )
    if DIRECTIONS == 2:
        K += tl.cast(num_kept, tl.int64) * (N * D)
        rows = rows_again(ROWS, entries, there)
        r1, r2 = load_rotated(Q, rows * q_row + head * D, COS, SIN, rows, there, scale, True, D, HALF)
        peak, total, acc = _attend(
            peak, total, acc, r1, r2, split, K, V, v_row, keys, low, high, True, True, D, HALF, KEYS
        )
        peak, total, acc = _attend(
            peak, total, acc, r1, r2, split, K, V, v_row, keys, high, keys, True, False, D, HALF, KEYS
        )
    rows = rows_again(ROWS, entries, there)
    store_rows(OUT, rows * (H * D) + head * D, there, acc / total[:, None], D, HALF)
    lse = (peak + tl.log2(total)) * LN2
    tl.store(LSE + rows * lse_row + tl.cast(head, tl.int64) * lse_head, lse, mask=there)
