"""The Triton kernels of the head's softmax: logits become their gradient where they are.

LOGITS [N, columns] is contiguous. BLOCK columns are more than a program's threads load at once, so that no two threads hold
the same logit: one could read what the other has written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bico_ds.native.triton_kernels import Launch

# fp32's least number, not -inf: columns of -inf alone then leave a peak that can be subtracted.
_LEAST = tl.constexpr(-3.4028234663852886e38)
_ROW_BLOCK, _ROW_WARPS = 8192, 16
_PART_BLOCK, _PART_WARPS = 2048, 4


@triton.jit
def _write_gradient(LOGITS, columns, start, label, shift, factor, BLOCK: tl.constexpr):
    """Of one row's BLOCK columns from `start`: exp(logit - shift) * factor, less 1 at the label."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(LOGITS + at, mask=at < columns, other=-float("inf")).to(tl.float32)
    gradient = tl.exp(x - shift) * factor - tl.where(at == label, 1.0, 0.0)
    tl.store(LOGITS + at, gradient.to(LOGITS.dtype.element_ty), mask=at < columns)


@triton.jit(do_not_specialize_on_alignment=("LABELS", "LSE", "LOSSES"))
def cross_entropy_kernel(
    LOGITS, LABELS, LSE, LOSSES, columns, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """LSE and LOSSES of a row, by one online softmax; with GRADIENT then the gradient in the place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * columns
    label = tl.load(LABELS + row)
    inside = (label >= 0) & (label < columns)
    # Read by every thread, and before the first reduction, at which all of them meet: none has written yet.
    picked = tl.load(LOGITS + label, mask=inside, other=float("nan")).to(tl.float32)
    peak = tl.full([], _LEAST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.exp(x - higher)
        peak = higher
    mass = tl.sum(total, 0)
    tl.store(LSE + row, peak + tl.log(mass))
    # Not lse - picked, whose rounding is that of the largest logit.
    tl.store(LOSSES + row, peak - picked + tl.log(mass))
    if GRADIENT:
        for start in range(0, columns, BLOCK):
            _write_gradient(LOGITS, columns, start, label, peak, 1.0 / mass, BLOCK)


@triton.jit(do_not_specialize_on_alignment=("LABELS", "LSE"))
def gradient_kernel(LOGITS, LABELS, LSE, first, columns, BLOCK: tl.constexpr):
    """The gradient in the place of logits of columns `first` and on of the vocabulary, by a row's LSE of all of it."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    label, lse = tl.load(LABELS + row) - first, tl.load(LSE + row)
    _write_gradient(LOGITS + row * columns, columns, start, label, lse, 1.0, BLOCK)


def cross_entropy_launch(
    logits: Tensor, labels: Tensor, lse: Tensor, losses: Tensor, gradient: bool
) -> Launch:
    rows, columns = logits.shape
    arguments: dict[str, Any] = {
        "LOGITS": logits,
        "LABELS": labels,
        "LSE": lse,
        "LOSSES": losses,
        "columns": columns,
        "GRADIENT": gradient,
        "BLOCK": _ROW_BLOCK,
    }
    return Launch(kernel=cross_entropy_kernel, programs=rows, arguments=arguments, warps=_ROW_WARPS)


def gradient_launch(logits: Tensor, labels: Tensor, lse: Tensor, first: int) -> Launch:
    rows, columns = logits.shape
    arguments: dict[str, Any] = {
        "LOGITS": logits,
        "LABELS": labels,
        "LSE": lse,
        "first": first,
        "columns": columns,
        "BLOCK": _PART_BLOCK,
    }
    programs = rows * triton.cdiv(columns, _PART_BLOCK)
    return Launch(kernel=gradient_kernel, programs=programs, arguments=arguments, warps=_PART_WARPS)
