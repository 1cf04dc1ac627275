"""Forward and backward of one batch: the fused CPU kernel, the Triton kernels, dense tiles and the flash kernel.

Each serves its rows of the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bico_ds.attention.dense import dense_backward, dense_forward
from bico_ds.attention.fused import fused_backward, fused_forward
from bico_ds.attention.inputs import AttentionInputs, AttentionResults, Gradients
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.layout import FlashRows, Layout, LayoutPolicy
from bico_ds.attention.triton.ops import triton_backward, triton_forward
from bico_ds.attention.two_pass import FlashProblem, two_pass_backward, two_pass_forward


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A flash kernel, and the policy of which rows it serves; what serves the rest is the policy's too."""

    kernel: CausalKernel
    policy: LayoutPolicy

    def forward(self, inputs: AttentionInputs, layout: Layout) -> AttentionResults:
        """The results of the batch's T rows; or with one scratch row more, which tiles fill, and whose lse is then +inf."""
        if layout.is_one_flash_problem:
            return two_pass_forward(self.kernel, _problem(layout.flash[0], layout, inputs))
        q, num_rows = inputs.q, layout.outline.num_rows
        results = AttentionResults(
            out=q.new_empty(num_rows + 1, *q.shape[1:]),
            lse=_empty_lse(q, num_rows + 1, by_head=layout.blocks is not None),
        )
        if layout.fused is not None:
            fused_forward(layout.fused, inputs, results)
        if layout.blocks is not None:
            triton_forward(layout.blocks, inputs, results)
        for tile in layout.tiles:
            dense_forward(tile, inputs, results)
        if layout.tiles:
            results.lse[-1] = float("inf")
        for group in layout.flash:
            rows, problem = _rows(group.query_rows, layout), _problem(group, layout, inputs)
            found = two_pass_forward(self.kernel, problem)
            _write(results.out, rows, found.out)
            _write(results.lse, rows, found.lse)
        return results

    def backward(
        self, inputs: AttentionInputs, layout: Layout, results: AttentionResults, grad_out: Tensor
    ) -> Gradients:
        """Gradients of raw q [T, Hq, Dh] and k, v [T, Hkv, Dh], exactly zero for the k and v of live rows."""
        if layout.is_one_flash_problem:
            problem = _problem(layout.flash[0], layout, inputs)
            dq, dk, dv = two_pass_backward(self.kernel, problem, results, grad_out)
            return dq.to(inputs.q.dtype), dk.to(inputs.k.dtype), dv.to(inputs.v.dtype)
        num_rows = layout.outline.num_rows
        dq = inputs.q.new_empty(num_rows + 1, *inputs.q.shape[1:])
        key_shape = (num_rows + 1, *inputs.k.shape[1:])
        if layout.is_one_table_of_blocks:
            dk, dv = (inputs.k.new_empty(key_shape) for _ in range(2))
        else:
            dk, dv = (inputs.k.new_zeros(key_shape, dtype=results.lse.dtype) for _ in range(2))
        for group in layout.flash:
            rows, problem = _rows(group.query_rows, layout), _problem(group, layout, inputs)
            own = AttentionResults(out=_read(results.out, rows), lse=_read(results.lse, rows))
            grads = two_pass_backward(self.kernel, problem, own, _read(grad_out, rows))
            for target, grad in zip((dq, dk, dv), grads, strict=True):
                _write(target, rows, grad)
        if layout.fused is not None:
            fused_backward(layout.fused, inputs, results, grad_out, (dq, dk, dv))
        if layout.blocks is not None:
            triton_backward(layout.blocks, inputs, results, grad_out, (dq, dk, dv))
        for tile in layout.tiles:
            dense_backward(tile, inputs, results, grad_out, (dq, dk, dv))
        return dq[:num_rows], dk[:num_rows].to(inputs.k.dtype), dv[:num_rows].to(inputs.v.dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The softmax, lse and merges run in at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _empty_lse(q: Tensor, rows: int, *, by_head: bool) -> Tensor:
    """[rows, H]; `by_head`: the rows of a head lie in one piece, as the Triton kernels read and write them."""
    heads, dtype = q.shape[1], accumulate_dtype(q.dtype)
    return q.new_empty(heads, rows, dtype=dtype).t() if by_head else q.new_empty(rows, heads, dtype=dtype)


def _rows(rows: Tensor | None, layout: Layout) -> Tensor | slice:
    """A group's rows in the batch; without a table all kept ones, where they are."""
    return slice(0, layout.outline.num_kept) if rows is None else rows


def _problem(group: FlashRows, layout: Layout, inputs: AttentionInputs) -> FlashProblem:
    """What the flash kernel computes for a group."""
    rows, key_rows = _rows(group.query_rows, layout), _rows(group.key_rows, layout)
    own = replace(
        inputs,
        q=_read(inputs.q, rows),
        k=_read(inputs.k, key_rows),
        v=_read(inputs.v, key_rows),
        cos=_read(inputs.cos, rows),
        sin=_read(inputs.sin, rows),
    )
    return FlashProblem(inputs=own, plan=group.plan, hidden=group.hidden)


def _read(x: Tensor, rows: Tensor | slice) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _write(target: Tensor, rows: Tensor | slice, x: Tensor) -> None:
    if isinstance(rows, slice):
        target[rows] = x
    else:
        target.index_copy_(0, rows, x.to(target.dtype))
