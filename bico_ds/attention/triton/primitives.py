"""What the attention kernels share: loads and stores of rows, and rotations.

A row of D columns stands in two halves, as the rotation pairs them. Tiles are padded: each half to HALF columns, a whole
row to 2 * HALF. Offsets of rows are 64-bit wherever they may leave 32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Softmax weights are powers of 2, as the hardware computes them.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rotate(x1, x2, c, s):
    """The halves x1, x2 rotated by cos and sin of one half. A negated sine reverses the rotation."""
    return x1 * c - x2 * s, x2 * c + x1 * s


@triton.jit
def half_mask(there, D: tl.constexpr, HALF: tl.constexpr):
    """[R, HALF], or [R, 1] where no column is padding: columns of one half, of the rows that are there."""
    mask = there[:, None]
    if D < 2 * HALF:
        mask = mask & (tl.arange(0, HALF) < D // 2)[None, :]
    return mask


@triton.jit
def row_mask(there, D: tl.constexpr, HALF: tl.constexpr):
    """[R, 2 * HALF], or [R, 1] where no column is padding: columns of a whole row, of the rows that are there."""
    mask = there[:, None]
    if D < 2 * HALF:
        mask = mask & (tl.arange(0, 2 * HALF) < D)[None, :]
    return mask


@triton.jit
def load_halves(X, offsets, there, D: tl.constexpr, HALF: tl.constexpr, AGAIN: tl.constexpr = False):
    """Both halves [R, HALF] of the rows of X at `offsets`, 0 elsewhere.

    AGAIN: a second read, volatile, so that the compiler does not keep the first one in registers instead.
    """
    at = X + offsets[:, None] + tl.arange(0, HALF)[None, :]
    mask = half_mask(there, D, HALF)
    return (
        tl.load(at, mask=mask, other=0.0, volatile=AGAIN),
        tl.load(at + D // 2, mask=mask, other=0.0, volatile=AGAIN),
    )


@triton.jit
def load_rows(X, offsets, there, D: tl.constexpr, HALF: tl.constexpr):
    """The rows [R, 2 * HALF] of X at `offsets`, 0 elsewhere."""
    at = X + offsets[:, None] + tl.arange(0, 2 * HALF)[None, :]
    return tl.load(at, mask=row_mask(there, D, HALF), other=0.0)


@triton.jit
def load_tables(COS, SIN, rows, there, D: tl.constexpr, HALF: tl.constexpr):
    """cos and sin [R, HALF] of the rows, in fp32; the rotation by 0 elsewhere.

    Always volatile: kernels read them once for each use, instead of keeping them in registers in between.
    """
    at = rows.to(tl.int64)[:, None] * D + tl.arange(0, HALF)[None, :]
    mask = half_mask(there, D, HALF)
    return (
        tl.load(COS + at, mask=mask, other=1.0, volatile=True).to(tl.float32),
        tl.load(SIN + at, mask=mask, other=0.0, volatile=True).to(tl.float32),
    )


@triton.jit
def load_rotated(
    X, offsets, COS, SIN, rows, there, scale, REVERSE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr
):
    """Both halves of the rows of X at `offsets`, rotated and scaled, in X's dtype."""
    x1, x2 = load_halves(X, offsets, there, D, HALF, AGAIN=REVERSE)
    c, s = load_tables(COS, SIN, rows, there, D, HALF)
    if REVERSE:
        s = -s
    r1, r2 = rotate(x1.to(tl.float32), x2.to(tl.float32), c, s)
    return (r1 * scale).to(X.dtype.element_ty), (r2 * scale).to(X.dtype.element_ty)


@triton.jit
def turn(a1, a2, c, s):
    """Re-express what gathered in a forward-rotated frame so that the reversed frame's way back undoes it.

    Rotation multiplies each pair by z = c + i s, or reversed by its conjugate; gradients go back by the conjugate, or
    reversed by z. So z (conj(z)^2 / |z|^2 a + b) = conj(z) a + z b: one accumulator serves both. |z| may differ from 1.
    """
    length = c * c + s * s
    return rotate(a1, a2, (c * c - s * s) / length, -2.0 * c * s / length)


@triton.jit
def store_halves(X, offsets, there, x1, x2, D: tl.constexpr, HALF: tl.constexpr):
    at = X + offsets[:, None] + tl.arange(0, HALF)[None, :]
    mask = half_mask(there, D, HALF)
    tl.store(at, x1.to(X.dtype.element_ty), mask=mask)
    tl.store(at + D // 2, x2.to(X.dtype.element_ty), mask=mask)


@triton.jit
def add_halves(X, offsets, there, x1, x2, D: tl.constexpr, HALF: tl.constexpr):
    """Add to rows that no other program writes."""
    old1, old2 = load_halves(X, offsets, there, D, HALF)
    store_halves(X, offsets, there, x1 + old1, x2 + old2, D, HALF)


@triton.jit
def store_rows(X, offsets, there, x, D: tl.constexpr, HALF: tl.constexpr):
    at = X + offsets[:, None] + tl.arange(0, 2 * HALF)[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=row_mask(there, D, HALF))


@triton.jit
def meets(split, key, REVERSE: tl.constexpr):
    """Whether a query with this split takes this key of its document in this direction."""
    return (key < split) != REVERSE


@triton.jit
def load_query_block(ROWS, SPLIT, BLOCKS, H: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """This program's head and rows: entries of the table, which of them are there, rows in the batch, splits.

    Then its document's first key in the batch, and ends of ranges of its keys: before `low` every row takes them forward,
    from `low` to `high` some rows do, from there to `keys` every row takes them reversed.
    """
    head, block = tl.program_id(0) % H, BLOCKS + tl.program_id(0) // H * 4
    begin, end, key0, keys = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    entries = begin + tl.arange(0, BLOCK)
    there = entries < end
    rows = tl.load(ROWS + entries, mask=there, other=0).to(tl.int64)
    split = tl.load(SPLIT + entries, mask=there, other=0)
    low = tl.load(SPLIT + begin) // KEYS * KEYS
    high = tl.minimum(tl.cdiv(tl.load(SPLIT + end - 1), KEYS) * KEYS, keys)
    return head, entries, there, rows, split, key0, low, high, keys


@triton.jit
def rows_again(ROWS, entries, there):
    """The rows that `load_query_block` gave, read again, so that they take no registers in between."""
    return tl.load(ROWS + entries, mask=there, other=0, volatile=True).to(tl.int64)


@triton.jit(do_not_specialize=("num_rows",))
def rotate_kernel(
    X, COS, SIN, ROTATED, num_rows, x_row,
    DIRECTIONS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROTATED [DIRECTIONS, N, num_rows, D]: the first rows of X [T, N, D], rotated forward, and reversed."""
    head, rows = tl.program_id(0) % N, tl.program_id(0) // N * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    at = rows.to(tl.int64) * x_row + head * D
    for direction in tl.static_range(DIRECTIONS):
        r1, r2 = load_rotated(X, at, COS, SIN, rows, there, 1.0, direction == 1, D, HALF)
        first = tl.cast(direction * N + head, tl.int64) * num_rows
        store_halves(ROTATED, (first + rows) * D, there, r1, r2, D, HALF)
