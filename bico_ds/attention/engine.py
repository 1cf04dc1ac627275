"""Forward and backward of one batch: dense tiles and the two-pass flash kernel, each on its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bico_ds.attention.dense import DenseInputs, dense_backward, dense_forward
from bico_ds.attention.fused import fused_backward, fused_forward
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.layout import LayoutPolicy, layout_of
from bico_ds.attention.plan import AttentionPlan
from bico_ds.attention.two_pass import two_pass_backward, two_pass_forward


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A flash kernel for long documents, dense tiles for the rest, and the policy that draws the line."""

    kernel: CausalKernel
    policy: LayoutPolicy

    def forward(self, inputs: DenseInputs, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """out [T+1, Hq, Dh] in q's dtype and lse [T+1, Hq] in at least fp32; row T is scratch, its lse
        +inf."""
        layout = layout_of(plan, self.policy)
        q = inputs.q
        out = q.new_empty(plan.num_rows + 1, *q.shape[1:])
        lse = q.new_empty(plan.num_rows + 1, q.shape[1], dtype=accumulate_dtype(q.dtype))
        if layout.fused is not None:
            fused_forward(layout.fused, inputs, out, lse)
        for tile in layout.tiles:
            dense_forward(tile, inputs, out, lse)
        lse[-1] = float("inf")
        if layout.flash_plan is not None:
            rows = _flash_rows(layout.flash_rows, plan)
            q, k, v, cos, sin = (x[rows] for x in (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin))
            out[rows], flash_lse = two_pass_forward(
                self.kernel, q, k, v, cos, sin, layout.flash_plan, inputs.scale
            )
            lse[rows] = flash_lse.t()
        return out, lse

    def backward(
        self, grad_out: Tensor, inputs: DenseInputs, plan: AttentionPlan, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of raw q [T, Hq, Dh] and k, v [T, Hkv, Dh], exactly zero for the k and v of live rows."""
        layout = layout_of(plan, self.policy)
        dq = inputs.q.new_empty(plan.num_rows + 1, *inputs.q.shape[1:])
        key_shape = (plan.num_rows + 1, *inputs.k.shape[1:])
        dk, dv = (inputs.k.new_zeros(key_shape, dtype=lse.dtype) for _ in range(2))
        if layout.flash_plan is not None:
            rows = _flash_rows(layout.flash_rows, plan)
            q, k, v, cos, sin = (x[rows] for x in (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin))
            grads = two_pass_backward(
                self.kernel,
                grad_out[rows],
                q,
                k,
                v,
                cos,
                sin,
                out[rows],
                lse[rows].t(),
                layout.flash_plan,
                inputs.scale,
            )
            dq[rows], dk[rows], dv[rows] = (x.to(y.dtype) for x, y in zip(grads, (dq, dk, dv), strict=True))
        if layout.fused is not None:
            fused_backward(layout.fused, inputs, grad_out, out, lse, dq, dk, dv)
        for tile in layout.tiles:
            dense_backward(tile, inputs, grad_out, lse, dq, dk, dv)
        rows = slice(0, plan.num_rows)
        return dq[rows], dk[rows].to(inputs.k.dtype), dv[rows].to(inputs.v.dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The softmax, lse and merges run in at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _flash_rows(rows: Tensor | None, plan: AttentionPlan) -> Tensor | slice:
    return slice(0, plan.num_kept) if rows is None else rows
