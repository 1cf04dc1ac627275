"""Bidirectional attention as two plain causal flash passes, merged by log-sum-exp.

Pass 1: causal over forward-rotated q and k (keys up to the query, diagonal included). Pass 2: the strictly
anti-causal part over reverse-rotated q and k, as a causal pass over flipped rows. Backward hands each kernel
the *merged* out and lse (as ring attention does, arXiv 2310.01889): `exp(s - lse)` is then the weight
within the one softmax.

Live placeholders may be rows of the same problem: queries whose own keys are *hidden*. Most kernels know no
key mask; for them the head dimension grows by 8 columns that add -4000 to the score of a hidden key. The
first row of a document is never hidden, so pass 1 always has a visible key; a pass-2 row that sees hidden
keys only has an lse near -4000, which the merge wipes out.

Shape legend: N rows, M flipped rows, H query heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from bico_ds.attention.inputs import AttentionInputs, AttentionResults, Gradients
from bico_ds.attention.kernels.base import HIDDEN_SCORE, CausalKernel
from bico_ds.attention.plan import AttentionPlan, map_tensors
from bico_ds.attention.rotation import rotate_back, rotate_forward

HIDDEN_COLUMNS = 8
_HIDDEN_KEY = -30000.0  # within fp16's range


@dataclass(frozen=True, kw_only=True)
class FlashProblem:
    """N rows by document and position: the kept rows of `plan`, whose live rows are ignored.

    `hidden` bool [N]: rows that no query sees as keys; None: there are none.
    """

    inputs: AttentionInputs
    plan: AttentionPlan
    hidden: Tensor | None = None


class _Settings(TypedDict):
    """What a kernel takes by keyword."""

    cu_seqlens: Tensor
    max_seqlen: int
    scale: float
    hidden: NotRequired[Tensor]


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Inputs of one kernel call: q, k, v, rotated and, with hidden keys, perhaps widened.

    The tables are cos and sin, [rows, 1, D], which rotated q and k and rotate their gradients back.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    query_tables: tuple[Tensor, Tensor]
    key_tables: tuple[Tensor, Tensor]
    cu_seqlens: Tensor
    max_seqlen: int
    scale: float
    hidden: Tensor | None

    @property
    def head_dim(self) -> int:
        """D, without the columns that hide keys."""
        return self.query_tables[0].shape[-1]

    @property
    def settings(self) -> _Settings:
        """`hidden` only where there are hidden keys."""
        packing = _Settings(cu_seqlens=self.cu_seqlens, max_seqlen=self.max_seqlen, scale=self.scale)
        return packing if self.hidden is None else {**packing, "hidden": self.hidden}


def two_pass_forward(kernel: CausalKernel, problem: FlashProblem) -> AttentionResults:
    """out and lse of the problem's N rows."""
    first = _pass_forward(kernel, _first_pass(kernel, problem))
    if problem.plan.flip_max_seqlen == 0:
        return first
    second = _pass_forward(kernel, _second_pass(kernel, problem))
    return merge(replace(first, out=first.out.contiguous()), second, problem.plan.flip_rows)


def merge(base: AttentionResults, other: AttentionResults, rows: Tensor) -> AttentionResults:
    """One softmax from two: `base` of N rows, updated in place at `rows` [M] by `other` of M rows.

    Computed in lse's dtype. Written with differences of lse, so that the farthest two neither overflow nor lose the base.
    """
    lse, lse2 = base.lse.t(), other.lse.t()  # [H, N] and [H, M], as kernels give them
    base_out, base_lse = base.out.index_select(0, rows).to(lse.dtype), lse.index_select(1, rows)
    difference = base_lse - lse2
    share = torch.sigmoid(-difference).t().unsqueeze(-1)
    merged = torch.addcmul(base_out, share, other.out - base_out)
    base.out.index_copy_(0, rows, merged.to(base.out.dtype))
    lse.index_copy_(1, rows, base_lse - logsigmoid(difference))
    return base


def two_pass_backward(
    kernel: CausalKernel, problem: FlashProblem, results: AttentionResults, grad_out: Tensor
) -> Gradients:
    """Gradients of the problem's raw q, k, v in lse's dtype.

    `results`: what `two_pass_forward` returned; grad_out [N, H, D].
    """
    plan = problem.plan
    dq, dk, dv = _pass_backward(kernel, _first_pass(kernel, problem), results, grad_out)
    if plan.flip_max_seqlen == 0:
        return dq, dk, dv
    queries = plan.flip_rows
    flipped = map_tensors(results, lambda x: x.index_select(0, queries))
    second = _second_pass(kernel, problem)
    dq2, dk2, dv2 = _pass_backward(kernel, second, flipped, grad_out.index_select(0, queries))
    dq.index_add_(0, queries, dq2)
    dk.index_add_(0, plan.flip_key_rows, dk2)
    dv.index_add_(0, plan.flip_key_rows, dv2)
    return dq, dk, dv


def _first_pass(kernel: CausalKernel, problem: FlashProblem) -> _Pass:
    inputs, plan = problem.inputs, problem.plan
    tables = inputs.cos[:, None], inputs.sin[:, None]
    return _fitted(
        kernel,
        _Pass(
            q=rotate_forward(inputs.q, *tables),
            k=rotate_forward(inputs.k, *tables),
            v=inputs.v.contiguous(),
            query_tables=tables,
            key_tables=tables,
            cu_seqlens=plan.cu_seqlens,
            max_seqlen=plan.max_seqlen,
            scale=inputs.scale,
            hidden=problem.hidden,
        ),
    )


def _second_pass(kernel: CausalKernel, problem: FlashProblem) -> _Pass:
    inputs, plan = problem.inputs, problem.plan
    queries, keys = plan.flip_rows, plan.flip_key_rows
    query_tables, key_tables = _reversed_tables(inputs, queries), _reversed_tables(inputs, keys)
    return _fitted(
        kernel,
        _Pass(
            q=rotate_forward(inputs.q.index_select(0, queries), *query_tables),
            k=rotate_forward(inputs.k.index_select(0, keys), *key_tables),
            v=inputs.v.index_select(0, keys),
            query_tables=query_tables,
            key_tables=key_tables,
            cu_seqlens=plan.flip_cu_seqlens,
            max_seqlen=plan.flip_max_seqlen,
            scale=inputs.scale,
            hidden=None if problem.hidden is None else problem.hidden[keys],
        ),
    )


def _reversed_tables(inputs: AttentionInputs, rows: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the reversed rotation at the rows."""
    return inputs.cos.index_select(0, rows)[:, None], inputs.sin.index_select(0, rows)[:, None].neg()


def _fitted(kernel: CausalKernel, inputs: _Pass) -> _Pass:
    """The pass in a form that the kernel can take.

    Where it knows no key mask, q and k have 8 more columns, whose product is -4000 for hidden keys and 0 for others.
    """
    if inputs.hidden is None or kernel.hides_keys:
        return inputs
    q, k, v = (pad(x, (0, HIDDEN_COLUMNS)) for x in (inputs.q, inputs.k, inputs.v))
    q[..., -1] = HIDDEN_SCORE / (_HIDDEN_KEY * inputs.scale)
    k[..., -1] = inputs.hidden[:, None] * _HIDDEN_KEY
    return replace(inputs, q=q, k=k, v=v, hidden=None)


def _pass_forward(kernel: CausalKernel, inputs: _Pass) -> AttentionResults:
    """out, perhaps a view of wider rows, and lse of one pass alone."""
    out, lse = kernel.forward(inputs.q, inputs.k, inputs.v, **inputs.settings)
    return AttentionResults(out=out[..., : inputs.head_dim], lse=lse.t())


def _pass_backward(
    kernel: CausalKernel, inputs: _Pass, results: AttentionResults, grad_out: Tensor
) -> Gradients:
    """Gradients of one pass's raw q, k, v. `results` are the merged ones."""
    D, out, lse = inputs.head_dim, results.out, results.lse
    if extra := inputs.q.shape[-1] - D:
        grad_out, out = (pad(x, (0, extra)) for x in (grad_out, out))
    grads = kernel.backward(grad_out, inputs.q, inputs.k, inputs.v, out, lse.t(), **inputs.settings)
    dq, dk, dv = (x[..., :D].to(lse.dtype) for x in grads)
    dq, dk = rotate_back([dq], *inputs.query_tables), rotate_back([dk], *inputs.key_tables)
    return dq, dk, dv.contiguous()
