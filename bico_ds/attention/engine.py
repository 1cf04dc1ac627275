"""Forward and backward of one batch: dense tiles and the two-pass flash kernel, each on its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bico_ds.attention.dense import DenseInputs, dense_backward, dense_forward
from bico_ds.attention.fused import fused_backward, fused_forward
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.layout import FlashRows, LayoutPolicy, layout_of
from bico_ds.attention.plan import AttentionPlan
from bico_ds.attention.two_pass import two_pass_backward, two_pass_forward


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A flash kernel for long documents, dense tiles for the rest, and the policy that draws the line."""

    kernel: CausalKernel
    policy: LayoutPolicy

    def forward(self, inputs: DenseInputs, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """out [T, Hq, Dh] in q's dtype and lse [T, Hq] in at least fp32; or with one scratch row more, whose
        lse is +inf."""
        layout = layout_of(plan, self.policy)
        if layout.is_one_flash_problem:
            whole = layout.flash[0]
            _, arguments = _flash_arguments(whole, inputs, plan)
            out, lse = two_pass_forward(self.kernel, *arguments, whole.plan, inputs.scale)
            return out, lse.t()
        q = inputs.q
        out = q.new_empty(plan.num_rows + 1, *q.shape[1:])
        lse = q.new_empty(plan.num_rows + 1, q.shape[1], dtype=accumulate_dtype(q.dtype))
        if layout.fused is not None:
            fused_forward(layout.fused, inputs, out, lse)
        for tile in layout.tiles:
            dense_forward(tile, inputs, out, lse)
        lse[-1] = float("inf")
        for group in layout.flash:
            rows, arguments = _flash_arguments(group, inputs, plan)
            group_out, group_lse = two_pass_forward(
                self.kernel, *arguments, group.plan, inputs.scale, group.hidden
            )
            _write(out, rows, group_out)
            _write(lse, rows, group_lse.t())
        return out, lse

    def backward(
        self, grad_out: Tensor, inputs: DenseInputs, plan: AttentionPlan, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of raw q [T, Hq, Dh] and k, v [T, Hkv, Dh], exactly zero for the k and v of live rows."""
        layout = layout_of(plan, self.policy)
        if layout.is_one_flash_problem:
            whole = layout.flash[0]
            _, arguments = _flash_arguments(whole, inputs, plan)
            grads = two_pass_backward(self.kernel, grad_out, out, lse, *arguments, whole.plan, inputs.scale)
            dq, dk, dv = (grad.to(inputs.q.dtype) for grad in grads)
            return dq, dk, dv
        dq = inputs.q.new_empty(plan.num_rows + 1, *inputs.q.shape[1:])
        key_shape = (plan.num_rows + 1, *inputs.k.shape[1:])
        dk, dv = (inputs.k.new_zeros(key_shape, dtype=lse.dtype) for _ in range(2))
        for group in layout.flash:
            rows, arguments = _flash_arguments(group, inputs, plan)
            results = (_read(grad_out, rows), _read(out, rows), _read(lse, rows))
            grads = two_pass_backward(
                self.kernel, *results, *arguments, group.plan, inputs.scale, hidden=group.hidden
            )
            for target, grad in zip((dq, dk, dv), grads, strict=True):
                _write(target, rows, grad)
        if layout.fused is not None:
            fused_backward(layout.fused, inputs, grad_out, out, lse, dq, dk, dv)
        for tile in layout.tiles:
            dense_backward(tile, inputs, grad_out, lse, dq, dk, dv)
        rows = slice(0, plan.num_rows)
        return dq[rows], dk[rows].to(inputs.k.dtype), dv[rows].to(inputs.v.dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The softmax, lse and merges run in at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _flash_arguments(
    group: FlashRows, inputs: DenseInputs, plan: AttentionPlan
) -> tuple[Tensor | slice, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Where the group's results go, and its q, k, v, cos, sin."""
    in_place = slice(0, plan.num_kept)
    rows = in_place if group.query_rows is None else group.query_rows
    key_rows = in_place if group.key_rows is None else group.key_rows
    q, cos, sin = (_read(x, rows) for x in (inputs.q, inputs.cos, inputs.sin))
    return rows, (q, _read(inputs.k, key_rows), _read(inputs.v, key_rows), cos, sin)


def _read(x: Tensor, rows: Tensor | slice) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _write(target: Tensor, rows: Tensor | slice, x: Tensor) -> None:
    if isinstance(rows, slice):
        target[rows] = x
    else:
        target.index_copy_(0, rows, x.to(target.dtype))
