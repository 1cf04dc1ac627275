"""Forward and backward of one batch: the fused CPU kernel, the Triton kernels, dense tiles and the flash kernel.

Each serves its rows of the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bico_ds.attention.dense import dense_backward, dense_forward, own_key_backward, own_key_forward
from bico_ds.attention.fused import fused_backward, fused_forward
from bico_ds.attention.inputs import AttentionInputs, AttentionResults, Gradients, accumulate_dtype
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.layout import FlashRows, Layout, LayoutPolicy, SpanRows
from bico_ds.attention.passes import TORCH_PASSES, FlashProblem, Passes, merge
from bico_ds.attention.triton.ops import triton_backward, triton_forward
from bico_ds.attention.two_pass import two_pass_backward, two_pass_forward
from bico_ds.named_parts import as_step_part, step_part


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
        results = self._over_kept_keys(inputs, layout)
        if layout.spans is not None:
            self._merge_spans(inputs, layout.spans, results)
        return results

    def backward(
        self, inputs: AttentionInputs, layout: Layout, results: AttentionResults, grad_out: Tensor
    ) -> Gradients:
        """Gradients of raw q [T, Hq, Dh] and k, v [T, Hkv, Dh]; those of the k and v of live rows are exactly zero.

        But for live rows in spans, which are keys. `results`: as `forward` gave them.
        """
        return self._gradients(inputs, layout, results, grad_out, is_part=layout.spans is not None)

    def _over_kept_keys(self, inputs: AttentionInputs, layout: Layout) -> AttentionResults:
        if layout.is_one_flash_problem:
            return two_pass_forward(self.kernel, self.passes, self._problem(layout.flash[0], inputs))
        q, num_rows = inputs.q, layout.outline.num_rows
        results = AttentionResults(
            out=q.new_empty(num_rows + 1, *q.shape[1:]),
            lse=_empty_lse(q, num_rows + 1, by_head=layout.blocks is not None),
        )
        with step_part(_served_besides_flash(layout)):
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

    @as_step_part("live rows")
    def _merge_spans(self, inputs: AttentionInputs, spans: SpanRows, results: AttentionResults) -> None:
        """What live rows see of their spans, into the one softmax of `results`, in place."""
        if spans.layout is not None:
            found, rows = self.forward(inputs.span_rows(spans.rows), spans.layout), len(spans.rows)
            merge(results, AttentionResults(out=found.out[:rows], lse=found.lse[:rows]), spans.rows)
        if len(spans.lone):
            merge(results, own_key_forward(inputs.span_rows(spans.lone)), spans.lone)

    def _gradients(
        self,
        inputs: AttentionInputs,
        layout: Layout,
        results: AttentionResults,
        grad_out: Tensor,
        *,
        is_part: bool,
    ) -> Gradients:
        """`is_part`: the softmax of `results` is over more keys than the layout's, of this or of another batch."""
        grad_out = grad_out.contiguous()
        if layout.is_one_flash_problem:
            problem = self._problem(layout.flash[0], inputs)
            return two_pass_backward(self.kernel, self.passes, problem, results, grad_out)
        grads = _empty_gradients(inputs, layout, results.lse.dtype)
        if layout.blocks is not None:
            with step_part(_served_besides_flash(layout)):
                triton_backward(layout.blocks, inputs, results, grad_out, grads)
        for group in layout.flash:
            problem, adds = self._problem(group, inputs), layout.blocks is not None
            two_pass_backward(self.kernel, self.passes, problem, results, grad_out, grads, adds=adds)
        with step_part(_served_besides_flash(layout)):
            if layout.fused is not None:
                fused_backward(layout.fused, inputs, results, grad_out, grads)
            for tile in layout.tiles:
                dense_backward(tile, inputs, results, grad_out, grads, is_part=is_part)
        if layout.spans is not None:
            self._add_spans(inputs, layout.spans, results, grad_out, grads)
        (dq, dk, dv), num_rows = grads, layout.outline.num_rows
        return dq[:num_rows], dk[:num_rows].to(inputs.k.dtype), dv[:num_rows].to(inputs.v.dtype)

    @as_step_part("live rows")
    def _add_spans(
        self,
        inputs: AttentionInputs,
        spans: SpanRows,
        results: AttentionResults,
        grad_out: Tensor,
        grads: Gradients,
    ) -> None:
        """Add what live rows see of their spans to `grads`, in which it is the only gradient of these rows' k and v."""
        for rows, layout in ((spans.rows, spans.layout), (spans.lone, None)):
            if not len(rows):
                continue
            part, grad = inputs.span_rows(rows), grad_out.index_select(0, rows)
            out, lse = results.out.index_select(0, rows), results.lse.index_select(0, rows)
            if layout is None:
                found = own_key_backward(part, AttentionResults(out=out, lse=lse), grad)
            else:
                lse = pad(lse, (0, 0, 0, 1), value=float("inf"))  # the scratch row of tiles
                known = AttentionResults(out=out, lse=lse)
                found = self._gradients(part, layout, known, grad, is_part=True)
            for whole, x in zip(grads, found, strict=True):
                whole.index_add_(0, rows, x.to(whole.dtype))

    def _problem(self, group: FlashRows, inputs: AttentionInputs) -> FlashProblem:
        """What the flash kernel computes for a group."""
        widens = group.hidden is not None and not self.kernel.hides_keys
        return FlashProblem(inputs=inputs, rows=group, widens=widens)


def _served_besides_flash(layout: Layout) -> str:
    """What the fused kernel, the Triton kernels and tiles serve, as a part of a step."""
    return "live rows" if layout.flash_serves_all_kept else "attention fused"


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
