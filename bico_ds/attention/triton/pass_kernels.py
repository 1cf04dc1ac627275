"""The kernels around the two flash passes (bico_ds/attention/passes.py): each reads a row once, for both passes.

A program works on a block of the problem's rows, in one head. Where a problem is a table of rows (GATHERS), they lie in the
batch where ROWS says. PLACES holds each row's place in the flipped pass, -1 where it has none; a key's place is that of the
row before it. Rows of a pass have WIDTH columns: D, or with hidden keys 8 more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bico_ds.attention.triton.primitives import (
    LN2,
    LOG2E,
    load_halves,
    load_rows,
    load_tables,
    rotate,
    store_halves,
    store_rows,
)


@triton.jit
def _sources(ROWS, rows, there, GATHERS: tl.constexpr):
    """Where the problem's rows lie in the batch."""
    sources = rows
    if GATHERS:
        sources = tl.load(ROWS + rows, mask=there, other=0)
    return sources.to(tl.int64)


@triton.jit
def _places(PLACES, rows, there, BEFORE: tl.constexpr):
    """Places in the flipped pass of queries, or (BEFORE 1) of keys, and which have one."""
    places = tl.load(PLACES + rows - BEFORE, mask=there & (rows >= BEFORE), other=-1)
    return places.to(tl.int64), places >= 0


@triton.jit
def _store_margin(X, offsets, there, last, D: tl.constexpr, WIDTH: tl.constexpr):
    """The columns beyond D: 0, and `last` [R] in the last one."""
    if WIDTH > D:
        columns = D + tl.arange(0, WIDTH - D)[None, :]
        margin = tl.where(columns == WIDTH - 1, last[:, None], 0.0)
        tl.store(X + offsets[:, None] + columns, margin.to(X.dtype.element_ty), mask=there[:, None])


@triton.jit
def _turn(
    X, at, FIRST, SECOND, there, to, to_flipped, flipped, c, s, last,
    DIRECTIONS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of X, rotated forward into FIRST, and reversed into SECOND."""
    x1, x2 = load_halves(X, at, there, D, HALF)
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    r1, r2 = rotate(x1, x2, c, s)
    store_halves(FIRST, to, there, r1, r2, D, HALF)
    _store_margin(FIRST, to, there, last, D, WIDTH)
    if DIRECTIONS == 2:
        r1, r2 = rotate(x1, x2, c, -s)
        store_halves(SECOND, to_flipped, flipped, r1, r2, D, HALF)
        _store_margin(SECOND, to_flipped, flipped, last, D, WIDTH)


@triton.jit(do_not_specialize=("num_rows",))
def rotated_kernel(
    Q, K, V, COS, SIN, ROWS, KEY_ROWS, HIDDEN, PLACES, Q1, K1, V1, Q2, K2, V2,
    num_rows, q_row, k_row, v_row, query_hider, key_hider,
    DIRECTIONS: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr, GATHERS: tl.constexpr, WRITES_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Q1, K1, V1 [num_rows, heads, WIDTH]: inputs of the first pass; Q2, K2, V2 those of the flipped one.

    Heads from H on are those of k and, where they are copied (WRITES_V, or for the flipped pass), of v.
    """
    heads: tl.constexpr = H + 2 * N if WRITES_V or DIRECTIONS == 2 else H + N
    head, rows = tl.program_id(0) % heads, tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    wide = rows.to(tl.int64)
    flipped, place = there, wide
    if head < H:
        if DIRECTIONS == 2:
            place, flipped = _places(PLACES, rows, there, 0)
        sources = _sources(ROWS, rows, there, GATHERS)
        c, s = load_tables(COS, SIN, sources, there, D, HALF)
        last = tl.zeros([BLOCK], tl.float32) + query_hider
        _turn(
            Q, sources * q_row + head * D, Q1, Q2, there, (wide * H + head) * WIDTH,
            (place * H + head) * WIDTH, flipped, c, s, last, DIRECTIONS, D, HALF, WIDTH,
        )  # fmt: skip
    else:
        if DIRECTIONS == 2:
            place, flipped = _places(PLACES, rows, there, 1)
        sources = _sources(KEY_ROWS, rows, there, GATHERS)
        key_head = (head - H) % N
        to, to_flipped = (wide * N + key_head) * WIDTH, (place * N + key_head) * WIDTH
        if head < H + N:
            c, s = load_tables(COS, SIN, _sources(ROWS, rows, there, GATHERS), there, D, HALF)
            last = tl.zeros([BLOCK], tl.float32)
            if WIDTH > D:
                last = tl.load(HIDDEN + rows, mask=there, other=0).to(tl.float32) * key_hider
            _turn(
                K, sources * k_row + key_head * D, K1, K2, there, to, to_flipped, flipped, c, s, last,
                DIRECTIONS, D, HALF, WIDTH,
            )  # fmt: skip
        else:
            v = load_rows(V, sources * v_row + key_head * D, there, D, HALF)
            none = tl.zeros([BLOCK], tl.float32)
            if WRITES_V:
                store_rows(V1, to, there, v, D, HALF)
                _store_margin(V1, to, there, none, D, WIDTH)
            if DIRECTIONS == 2:
                store_rows(V2, to_flipped, flipped, v, D, HALF)
                _store_margin(V2, to_flipped, flipped, none, D, WIDTH)


@triton.jit(do_not_specialize=("num_rows", "num_flipped", "lse_head"))
def merged_kernel(
    OUT1, LSE1, OUT2, LSE2, ROWS, PLACES, OUT, LSE, num_rows, num_flipped, lse_row, lse_head,
    DIRECTIONS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    GATHERS: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT [T, H, D] and LSE, of any strides, from each pass's out [rows, H, WIDTH] and lse [H, rows].

    IN_PLACE: OUT and LSE are those of the first pass, and rows without a second one stay. With differences of lse, so that
    the farthest two neither overflow nor lose the first.
    """
    head, rows = tl.program_id(0) % H, tl.program_id(0) // H * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    wide = rows.to(tl.int64)
    written, place = there, wide
    if DIRECTIONS == 2:
        place, flipped = _places(PLACES, rows, there, 0)
        if IN_PLACE:
            written = flipped
    a1, a2 = load_halves(OUT1, (wide * H + head) * WIDTH, written, D, HALF)
    a1, a2 = a1.to(tl.float32), a2.to(tl.float32)
    lse = tl.load(LSE1 + tl.cast(head, tl.int64) * num_rows + rows, mask=written, other=0.0)
    if DIRECTIONS == 2:
        b1, b2 = load_halves(OUT2, (place * H + head) * WIDTH, flipped, D, HALF)
        lse2 = tl.load(LSE2 + tl.cast(head, tl.int64) * num_flipped + place, mask=flipped, other=0.0)
        distance = lse2 - lse
        share = tl.where(flipped, 1.0 / (1.0 + tl.exp2(-distance * LOG2E)), 0.0)[:, None]
        a1 += share * (b1.to(tl.float32) - a1)
        a2 += share * (b2.to(tl.float32) - a2)
        grown = tl.maximum(distance, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(distance) * LOG2E)) * LN2
        lse += tl.where(flipped, grown, 0.0)
    sources = _sources(ROWS, rows, there, GATHERS)
    store_halves(OUT, (sources * H + head) * D, written, a1, a2, D, HALF)
    tl.store(LSE + sources * lse_row + tl.cast(head, tl.int64) * lse_head, lse, mask=written)


@triton.jit(do_not_specialize=("num_rows", "num_flipped", "lse_head"))
def gathered_kernel(
    GRAD, OUT, LSE, ROWS, PLACES, GRAD1, OUT1, LSE1, GRAD2, OUT2, LSE2,
    num_rows, num_flipped, lse_row, lse_head,
    DIRECTIONS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    GATHERS: tl.constexpr, WRITES_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of GRAD and OUT [T, H, D] and LSE, of any strides, in the order of the second pass, and of the first one, too."""
    head, rows = tl.program_id(0) % H, tl.program_id(0) // H * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    sources = _sources(ROWS, rows, there, GATHERS)
    at, none = (sources * H + head) * D, tl.zeros([BLOCK], tl.float32)
    grad, out = load_rows(GRAD, at, there, D, HALF), load_rows(OUT, at, there, D, HALF)
    lse = tl.load(LSE + sources * lse_row + tl.cast(head, tl.int64) * lse_head, mask=there, other=0.0)
    if WRITES_FIRST:
        to = (rows.to(tl.int64) * H + head) * WIDTH
        store_rows(GRAD1, to, there, grad, D, HALF)
        _store_margin(GRAD1, to, there, none, D, WIDTH)
        store_rows(OUT1, to, there, out, D, HALF)
        _store_margin(OUT1, to, there, none, D, WIDTH)
        tl.store(LSE1 + tl.cast(head, tl.int64) * num_rows + rows, lse, mask=there)
    if DIRECTIONS == 2:
        place, flipped = _places(PLACES, rows, there, 0)
        to = (place * H + head) * WIDTH
        store_rows(GRAD2, to, flipped, grad, D, HALF)
        _store_margin(GRAD2, to, flipped, none, D, WIDTH)
        store_rows(OUT2, to, flipped, out, D, HALF)
        _store_margin(OUT2, to, flipped, none, D, WIDTH)
        tl.store(LSE2 + tl.cast(head, tl.int64) * num_flipped + place, lse, mask=flipped)


@triton.jit
def _turn_back(
    G1, G2, at, at_flipped, there, flipped, c, s,
    DIRECTIONS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The gradient of raw rows from those of the forward-rotated and the reverse-rotated ones."""
    g1, g2 = load_halves(G1, at, there, D, HALF)
    x1, x2 = rotate(g1.to(tl.float32), g2.to(tl.float32), c, -s)
    if DIRECTIONS == 2:
        g1, g2 = load_halves(G2, at_flipped, flipped, D, HALF)
        y1, y2 = rotate(g1.to(tl.float32), g2.to(tl.float32), c, s)
        x1, x2 = x1 + y1, x2 + y2
    return x1, x2


@triton.jit(do_not_specialize=("num_rows",))
def summed_kernel(
    DQ1, DK1, DV1, DQ2, DK2, DV2, COS, SIN, ROWS, PLACES, DQ, DK, DV, num_rows,
    ADDS: tl.constexpr, DIRECTIONS: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, WIDTH: tl.constexpr, GATHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DQ [T, H, D], DK and DV [T, N, D] from the gradients of each pass's inputs, [rows, heads, WIDTH]; sums in fp32.

    ADDS: DK and DV are added to what is there. Heads from H on are those of k, then of v.
    """
    heads: tl.constexpr = H + 2 * N
    head, rows = tl.program_id(0) % heads, tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    wide, sources = rows.to(tl.int64), _sources(ROWS, rows, there, GATHERS)
    flipped, place = there, wide
    if head < H:
        if DIRECTIONS == 2:
            place, flipped = _places(PLACES, rows, there, 0)
        c, s = load_tables(COS, SIN, sources, there, D, HALF)
        at, at_flipped = (wide * H + head) * WIDTH, (place * H + head) * WIDTH
        x1, x2 = _turn_back(DQ1, DQ2, at, at_flipped, there, flipped, c, s, DIRECTIONS, D, HALF)
        store_halves(DQ, (sources * H + head) * D, there, x1, x2, D, HALF)
    else:
        if DIRECTIONS == 2:
            place, flipped = _places(PLACES, rows, there, 1)
        key_head = (head - H) % N
        at, at_flipped = (wide * N + key_head) * WIDTH, (place * N + key_head) * WIDTH
        to = (sources * N + key_head) * D
        if head < H + N:
            c, s = load_tables(COS, SIN, sources, there, D, HALF)
            x1, x2 = _turn_back(DK1, DK2, at, at_flipped, there, flipped, c, s, DIRECTIONS, D, HALF)
            if ADDS:
                old1, old2 = load_halves(DK, to, there, D, HALF)
                x1, x2 = x1 + old1.to(tl.float32), x2 + old2.to(tl.float32)
            store_halves(DK, to, there, x1, x2, D, HALF)
        else:
            x = load_rows(DV1, at, there, D, HALF).to(tl.float32)
            if DIRECTIONS == 2:
                x += load_rows(DV2, at_flipped, flipped, D, HALF).to(tl.float32)
            if ADDS:
                x += load_rows(DV, to, there, D, HALF).to(tl.float32)
            store_rows(DV, to, there, x, D, HALF)
