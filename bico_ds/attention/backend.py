"""Forward and backward of one batch: the fused CPU kernel, the Triton kernels, dense tiles and the flash kernel.

Each serves its rows of the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bico_ds.attention.dense import dense_backward, dense_forward
from bico_ds.attention.fused import fused_backward, fused_forward
from bico_ds.attention.inputs import AttentionInputs, AttentionResults, Gradients
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.layout import FlashRows, Layout, LayoutPolicy
from bico_ds.attention.passes import TORCH_PASSES, FlashProblem, Passes
from bico_ds.attention.triton.ops import triton_backward, triton_forward
from bico_ds.attention.two_pass import two_pass_backward, two_pass_forward


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A flash kernel, and the policy of which rows it serves; what serves the rest is the policy's too.

    `passes`: what is done around the flash kernel's two passes.
    """

    kernel: CausalKernel
    policy: LayoutPolicy
    passes: Passes = TORCH_PASSES

    def forward(self, inputs: AttentionInputs, layout: Layout) -> AttentionResults:
        """The results of the batch's T rows; or with one scratch row more, which tiles fill, and whose lse is then +inf."""
        if layout.is_one_flash_problem:
            return two_pass_forward(self.kernel, self.passes, self._problem(layout.flash[0], inputs))
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
            two_pass_forward(self.kernel, self.passes, self._problem(group, inputs), results)
        return results

    def backward(
        self, inputs: AttentionInputs, layout: Layout, results: AttentionResults, grad_out: Tensor
    ) -> Gradients:
        """Gradients of raw q [T, Hq, Dh] and k, v [T, Hkv, Dh], exactly zero for the k and v of live rows."""
        grad_out = grad_out.contiguous()
        if layout.is_one_flash_problem:
            problem = self._problem(layout.flash[0], inputs)
            return two_pass_backward(self.kernel, self.passes, problem, results, grad_out)
        grads = _empty_gradients(inputs, layout, results.lse.dtype)
        if layout.blocks is not None:
            triton_backward(layout.blocks, inputs, results, grad_out, grads)
        for group in layout.flash:
            problem, adds = self._problem(group, inputs), layout.blocks is not None
            two_pass_backward(self.kernel, self.passes, problem, results, grad_out, grads, adds=adds)
        if layout.fused is not None:
            fused_backward(layout.fused, inputs, results, grad_out, grads)
        for tile in layout.tiles:
            dense_backward(tile, inputs, results, grad_out, grads)
        (dq, dk, dv), num_rows = grads, layout.outline.num_rows
        return dq[:num_rows], dk[:num_rows].to(inputs.k.dtype), dv[:num_rows].to(inputs.v.dtype)

    def _problem(self, group: FlashRows, inputs: AttentionInputs) -> FlashProblem:
        """What the flash kernel computes for a group."""
        widens = group.hidden is not None and not self.kernel.hides_keys
        return FlashProblem(inputs=inputs, rows=group, widens=widens)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The softmax, lse and merges run in at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _empty_lse(q: Tensor, rows: int, *, by_head: bool) -> Tensor:
    """[rows, H]; `by_head`: the rows of a head lie in one piece, as the Triton kernels read and write them."""
    heads, dtype = q.shape[1], accumulate_dtype(q.dtype)
    return q.new_empty(heads, rows, dtype=dtype).t() if by_head else q.new_empty(rows, heads, dtype=dtype)


def _empty_gradients(inputs: AttentionInputs, layout: Layout, exact: torch.dtype) -> Gradients:
    """Rows for the gradients of q, k and v, one more than the batch has; 0 where gradients of k and v are to be added.

    Where tiles or the fused kernel add several times to a row, k's and v's are in `exact`; the Triton kernels and the flash
    passes write each row once each, and their one sum is rounded as they are.
    """
    rows = layout.outline.num_rows + 1
    dq = inputs.q.new_empty(rows, *inputs.q.shape[1:])
    key_shape = (rows, *inputs.k.shape[1:])
    if layout.is_one_table_of_blocks:
        return dq, inputs.k.new_empty(key_shape), inputs.k.new_empty(key_shape)
    dtype = exact if layout.tiles or layout.fused is not None else inputs.k.dtype
    return dq, inputs.k.new_zeros(key_shape, dtype=dtype), inputs.k.new_zeros(key_shape, dtype=dtype)
