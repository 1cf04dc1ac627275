"""The backward kernels: gradients of q by blocks of rows, then of k and v by blocks of keys. No atomics: deterministic.

Rows, splits and blocks are those of `RowBlocks`. K holds the batch's kept keys, rotated: [DIRECTIONS, N, num_kept, D].
The first kernel leaves for the second, in the table's order: the rotated queries ROTATED [DIRECTIONS, H, Q, D], which
carry the scores' scale in base 2; LSE2 [H, Q], the lse in base 2; DELTA [H, Q] = rowsum(grad * out).
"""

from __future__ import annotations

import triton
import triton.language as tl

from bico_ds.attention.triton.primitives import (
    LN2,
    LOG2E,
    add_halves,
    load_halves,
    load_query_block,
    load_rotated,
    load_rows,
    load_tables,
    meets,
    rotate,
    rows_again,
    store_halves,
    store_rows,
    turn,
)


@triton.jit
def _query_gradient(
    a1, a2, r1, r2, grad, lse, delta, split, K, V, v_row, keys, begin, end,
    REVERSE: tl.constexpr, MIXED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add what keys [begin, end) of the document give to the gradient a1, a2 of the rotated queries. MIXED: as forward."""
    for start in range(begin, end, KEYS):
        j = start + tl.arange(0, KEYS)
        there = j < keys
        k1, k2 = load_halves(K, j.to(tl.int64) * D, there, D, HALF)
        scores = tl.dot(r1, tl.trans(k1))
        scores = tl.dot(r2, tl.trans(k2), scores)
        p = tl.exp2(scores - lse[:, None])
        if MIXED:
            p = tl.where(meets(split[:, None], j[None, :], REVERSE), p, 0.0)
        if REVERSE:
            p = tl.where(there[None, :], p, 0.0)
        v = load_rows(V, j.to(tl.int64) * v_row, there, D, HALF)
        ds = p * (tl.dot(grad, tl.trans(v)) - delta[:, None])
        a1 = tl.dot(ds.to(k1.dtype), k1, a1)
        a2 = tl.dot(ds.to(k1.dtype), k2, a2)
    return a1, a2


@triton.jit(do_not_specialize=("num_kept", "num_entries", "lse_head"))
def query_gradient_kernel(
    Q, K, V, COS, SIN, ROWS, SPLIT, BLOCKS, OUT, LSE, GRAD, DQ, ROTATED, LSE2, DELTA,
    softmax_scale, num_kept, num_entries, q_row, v_row, lse_row, lse_head,
    DIRECTIONS: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """DQ [T, H, D] of a block of query rows, one head; also what the other kernel reads of these rows."""
    head, entries, there, rows, split, key0, low, high, keys = load_query_block(
        ROWS, SPLIT, BLOCKS, H, BLOCK, KEYS
    )
    key_head = head // (H // N)
    K += (tl.cast(key_head, tl.int64) * num_kept + key0) * D
    V += tl.cast(key0, tl.int64) * v_row + key_head * D
    at, scale = rows * (H * D) + head * D, softmax_scale * LOG2E
    in_table = tl.cast(head, tl.int64) * num_entries + entries

    grad = load_rows(GRAD, at, there, D, HALF)
    out = load_rows(OUT, at, there, D, HALF)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lse_at = rows * lse_row + tl.cast(head, tl.int64) * lse_head
    lse = tl.load(LSE + lse_at, mask=there, other=float("inf")) * LOG2E
    tl.store(DELTA + in_table, delta, mask=there)
    tl.store(LSE2 + in_table, lse, mask=there)

    a1, a2 = tl.zeros([BLOCK, HALF], tl.float32), tl.zeros([BLOCK, HALF], tl.float32)
    r1, r2 = load_rotated(Q, rows * q_row + head * D, COS, SIN, rows, there, scale, False, D, HALF)
    store_halves(ROTATED, in_table * D, there, r1, r2, D, HALF)
    a1, a2 = _query_gradient(
        a1, a2, r1, r2, grad, lse, delta, split, K, V, v_row, keys, 0, low, False, False, D, HALF, KEYS
    )
    a1, a2 = _query_gradient(
        a1, a2, r1, r2, grad, lse, delta, split, K, V, v_row, keys, low, high, False, True, D, HALF, KEYS
    )
    c, s = load_tables(COS, SIN, rows, there, D, HALF)
    if DIRECTIONS == 2:
        K += tl.cast(num_kept, tl.int64) * (N * D)
        a1, a2 = turn(a1, a2, c, s)
        rows = rows_again(ROWS, entries, there)
        r1, r2 = load_rotated(Q, rows * q_row + head * D, COS, SIN, rows, there, scale, True, D, HALF)
        in_reversed = tl.cast(H, tl.int64) * num_entries + in_table
        store_halves(ROTATED, in_reversed * D, there, r1, r2, D, HALF)
        a1, a2 = _query_gradient(
            a1, a2, r1, r2, grad, lse, delta, split, K, V, v_row, keys, low, high, True, True, D, HALF, KEYS
        )
        a1, a2 = _query_gradient(
            a1, a2, r1, r2, grad, lse, delta, split, K, V, v_row, keys, high, keys, True, False, D, HALF, KEYS
        )
        rows = rows_again(ROWS, entries, there)
        c, s = load_tables(COS, SIN, rows, there, D, HALF)
        s = -s
    d1, d2 = rotate(a1 * softmax_scale, a2 * softmax_scale, c, -s)
    store_halves(DQ, rows * (H * D) + head * D, there, d1, d2, D, HALF)


@triton.jit
def _key_gradient(
    a1, a2, dv, k1, k2, v, j, ROWS, SPLIT, GRAD, ROTATED, LSE2, DELTA, num_entries, group0, begin, end,
    REVERSE: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add what the table's rows [begin, end) give, in all heads of a group, to the gradients of rotated keys and values.

    The heads from `group0` on and their blocks of rows are one loop, which keeps loads in flight where documents are
    short. GRAD lies in the batch's order: in three stages or more its rows are there one stage before they are needed.
    """
    blocks = tl.cdiv(end - begin, BLOCK)
    for i in range(0, blocks * (H // N)):
        head = group0 + i // blocks
        entries = begin + i % blocks * BLOCK + tl.arange(0, BLOCK)
        there = entries < end
        head0 = tl.cast(head, tl.int64) * num_entries
        r1, r2 = load_halves(ROTATED + head0 * D, entries.to(tl.int64) * D, there, D, HALF)
        scores = tl.dot(k1, tl.trans(r1))
        scores = tl.dot(k2, tl.trans(r2), scores)
        lse = tl.load(LSE2 + head0 + entries, mask=there, other=float("inf"))
        split = tl.load(SPLIT + entries, mask=there, other=0)
        p = tl.where(meets(split[None, :], j[:, None], REVERSE), tl.exp2(scores - lse[None, :]), 0.0)
        rows = tl.load(ROWS + entries, mask=there, other=0).to(tl.int64)
        grad = load_rows(GRAD + head * D, rows * (H * D), there, D, HALF)
        dv = tl.dot(p.to(grad.dtype), grad, dv)
        delta = tl.load(DELTA + head0 + entries, mask=there, other=0.0)
        ds = p * (tl.dot(v, tl.trans(grad)) - delta[None, :])
        a1 = tl.dot(ds.to(r1.dtype), r1, a1)
        a2 = tl.dot(ds.to(r1.dtype), r2, a2)
    return a1, a2, dv


@triton.jit
def _keys(block, KEYS: tl.constexpr):
    """A block's keys: their numbers in the document, whether they are there, and their rows in the batch.

    Always read anew, as in `load_tables`.
    """
    first, key0 = tl.load(block, volatile=True), tl.load(block + 1, volatile=True)
    j = first + tl.arange(0, KEYS)
    return j, j < tl.load(block + 2, volatile=True), (key0 + j).to(tl.int64)


@triton.jit(do_not_specialize=("num_kept", "num_entries"))
def key_gradient_kernel(
    K, V, COS, SIN, ROWS, SPLIT, BLOCKS, GRAD, ROTATED, LSE2, DELTA, DK, DV, num_kept, num_entries, v_row,
    ADDS: tl.constexpr, DIRECTIONS: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """DK and DV [T, N, D] of a block of keys, one key head, over all its query heads; ADDS: added to what is there."""
    head, block = tl.program_id(0) % N, BLOCKS + tl.program_id(0) // N * 7
    begin, some_forward = tl.load(block + 3), tl.load(block + 4)
    all_forward, end = tl.load(block + 5), tl.load(block + 6)
    j, there, rows = _keys(block, KEYS)
    group0 = head * (H // N)
    v = load_rows(V, rows * v_row + head * D, there, D, HALF)
    k_at = (tl.cast(head, tl.int64) * num_kept + rows) * D
    k1, k2 = load_halves(K, k_at, there, D, HALF)
    a1, a2 = tl.zeros([KEYS, HALF], tl.float32), tl.zeros([KEYS, HALF], tl.float32)
    dv = tl.zeros([KEYS, 2 * HALF], tl.float32)
    a1, a2, dv = _key_gradient(
        a1, a2, dv, k1, k2, v, j, ROWS, SPLIT, GRAD, ROTATED, LSE2, DELTA, num_entries, group0,
        some_forward, end, False, H, N, D, HALF, BLOCK,
    )  # fmt: skip
    _, there, rows = _keys(block, KEYS)
    c, s = load_tables(COS, SIN, rows, there, D, HALF)
    if DIRECTIONS == 2:
        a1, a2 = turn(a1, a2, c, s)
        _, there, rows = _keys(block, KEYS)
        k_at = (tl.cast(head, tl.int64) * num_kept + rows) * D
        k1, k2 = load_halves(K + tl.cast(num_kept, tl.int64) * (N * D), k_at, there, D, HALF)
        ROTATED += tl.cast(num_entries, tl.int64) * (H * D)
        a1, a2, dv = _key_gradient(
            a1, a2, dv, k1, k2, v, j, ROWS, SPLIT, GRAD, ROTATED, LSE2, DELTA, num_entries, group0,
            begin, all_forward, True, H, N, D, HALF, BLOCK,
        )  # fmt: skip
        _, there, rows = _keys(block, KEYS)
        c, s = load_tables(COS, SIN, rows, there, D, HALF)
        s = -s
    # The rotated queries carry the softmax scale times log2(e).
    d1, d2 = rotate(a1 * LN2, a2 * LN2, c, -s)
    at = rows * (N * D) + head * D
    if ADDS:
        add_halves(DK, at, there, d1, d2, D, HALF)
        dv += load_rows(DV, at, there, D, HALF)
    else:
        store_halves(DK, at, there, d1, d2, D, HALF)
    store_rows(DV, at, there, dv, D, HALF)
