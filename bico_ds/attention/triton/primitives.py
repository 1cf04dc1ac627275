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


@triton.jit(do_not_specialize=("num_rows",))
def rotate_kernel(
    X, COS, SIN, ROTATED, num_rows, x_row,
    DIRECTIONS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROTATED [DIRECTIONS, N, num_rows, D]: the first rows of X [T, N, D], rotated forward, and reversed."""
    head, rows = tl.program_id(0) % N, tl.program_id(0) // N * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    x1, x2 = load_halves(X + head * D, rows.to(tl.int64) * x_row, there, D, HALF)
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    c, s = load_tables(COS, SIN, rows, there, D, HALF)
    for direction in tl.static_range(DIRECTIONS):
        y1, y2 = rotate(x1, x2, c, s)
        first = tl.cast(direction * N + head, tl.int64) * num_rows
        store_halves(ROTATED, (first + rows) * D, there, y1, y2, D, HALF)
        s = -s
