"""Bidirectional attention as two plain causal flash passes, merged by log-sum-exp.

Pass 1: causal over forward-rotated q and k (keys up to the query, diagonal included). Pass 2: the strictly
anti-causal part over reverse-rotated q and k, as a causal pass over flipped rows. Backward hands each kernel
the *merged* out and lse (as ring attention does, arXiv 2310.01889): ``exp(s - lse)`` is then the weight
within the one softmax.

Live placeholders may be rows of the same problem: queries whose own keys are *hidden*. Most kernels know no
key mask; for them the head dimension grows by 8 columns that add -4000 to the score of a hidden key. The
first row of a document is never hidden, so pass 1 always has a visible key; a pass-2 row that sees hidden
keys only has an lse near -4000, which the merge wipes out.

Shape legend: N rows, M flipped rows, H query heads, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from bico_ds.attention.kernels.base import HIDDEN_SCORE, CausalKernel
from bico_ds.attention.plan import AttentionPlan
from bico_ds.attention.rotation import rotate_back, rotate_forward

HIDDEN_COLUMNS = 8
_HIDDEN_KEY = -30000.0  # within fp16's range


class _Pass(NamedTuple):
    """Rotated and, with hidden keys, widened inputs of one kernel call, and what rotates its gradients
    back."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos_q: Tensor
    sin_q: Tensor
    cos_k: Tensor
    sin_k: Tensor
    settings: dict


def two_pass_forward(
    kernel: CausalKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: AttentionPlan,
    scale: float,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] and lse [Hq, N]. q [N, Hq, D], k, v [N, Hkv, D] raw, cos, sin [N, D], hidden bool
    [N]."""
    D = q.shape[-1]
    first = _first_pass(kernel, q, k, v, cos, sin, plan, scale, hidden)
    out, lse = kernel.forward(first.q, first.k, first.v, **first.settings)
    if plan.flip_max_seqlen == 0:
        return out[..., :D], lse
    second = _second_pass(kernel, q, k, v, cos, sin, plan, scale, hidden)
    out2, lse2 = kernel.forward(second.q, second.k, second.v, **second.settings)
    return merge(out[..., :D].contiguous(), lse, out2[..., :D], lse2, plan.flip_rows)


def merge(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax from two: ``out`` [N, H, D] and ``lse`` [H, N] updated in place at ``rows`` [M].

    Computed in lse's dtype. Written as differences, so that lse of any distance neither overflows nor loses
    the base.
    """
    base, base_lse = out.index_select(0, rows).to(lse.dtype), lse.index_select(1, rows)
    difference = base_lse - lse2
    share = torch.sigmoid(-difference).t().unsqueeze(-1)
    out.index_copy_(0, rows, torch.addcmul(base, share, out2 - base).to(out.dtype))
    lse.index_copy_(1, rows, base_lse - logsigmoid(difference))
    return out, lse


def two_pass_backward(
    kernel: CausalKernel,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: AttentionPlan,
    scale: float,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of raw q, k, v in lse's dtype. grad_out, out [N, Hq, D], lse [N, Hq]: merged; the rest as
    `two_pass_forward` took it."""
    problem = (kernel, q, k, v, cos, sin, plan, scale, hidden)
    dq, dk, dv = _pass_backward(kernel, _first_pass(*problem), grad_out, out, lse)
    if plan.flip_max_seqlen == 0:
        return dq, dk, dv
    queries = plan.flip_rows
    grad_out, out, lse = (x.index_select(0, queries) for x in (grad_out, out, lse))
    dq2, dk2, dv2 = _pass_backward(kernel, _second_pass(*problem), grad_out, out, lse)
    dq.index_add_(0, queries, dq2)
    dk.index_add_(0, plan.flip_key_rows, dk2)
    dv.index_add_(0, plan.flip_key_rows, dv2)
    return dq, dk, dv


def _first_pass(
    kernel: CausalKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: AttentionPlan,
    scale: float,
    hidden: Tensor | None,
) -> _Pass:
    cos, sin = cos[:, None], sin[:, None]
    rotated = rotate_forward(q, cos, sin), rotate_forward(k, cos, sin), v.contiguous()
    settings = {"cu_seqlens": plan.cu_seqlens, "max_seqlen": plan.max_seqlen, "scale": scale}
    if hidden is not None and kernel.hides_keys:
        return _Pass(*rotated, cos, sin, cos, sin, {**settings, "hidden": hidden})
    return _Pass(*_widened(*rotated, hidden, scale), cos, sin, cos, sin, settings)


def _second_pass(
    kernel: CausalKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: AttentionPlan,
    scale: float,
    hidden: Tensor | None,
) -> _Pass:
    queries, keys = plan.flip_rows, plan.flip_key_rows
    cos_q, cos_k = (cos.index_select(0, rows)[:, None] for rows in (queries, keys))
    sin_q, sin_k = (sin.index_select(0, rows)[:, None].neg() for rows in (queries, keys))
    rotated = (
        rotate_forward(q.index_select(0, queries), cos_q, sin_q),
        rotate_forward(k.index_select(0, keys), cos_k, sin_k),
        v.index_select(0, keys),
    )
    hidden = None if hidden is None else hidden[keys]
    settings = {"cu_seqlens": plan.flip_cu_seqlens, "max_seqlen": plan.flip_max_seqlen, "scale": scale}
    if hidden is not None and kernel.hides_keys:
        return _Pass(*rotated, cos_q, sin_q, cos_k, sin_k, {**settings, "hidden": hidden})
    return _Pass(*_widened(*rotated, hidden, scale), cos_q, sin_q, cos_k, sin_k, settings)


def _widened(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with 8 more columns whose product is -4000 for hidden keys and 0 for others."""
    if hidden is None:
        return q, k, v
    q, k, v = (pad(x, (0, HIDDEN_COLUMNS)) for x in (q, k, v))
    q[..., -1] = HIDDEN_SCORE / (_HIDDEN_KEY * scale)
    k[..., -1] = hidden[:, None] * _HIDDEN_KEY
    return q, k, v


def _pass_backward(
    kernel: CausalKernel, inputs: _Pass, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one pass's raw q, k, v. ``lse`` [N, Hq] is the merged one."""
    D = grad_out.shape[-1]
    extra = inputs.q.shape[-1] - D
    if extra:
        grad_out, out = (pad(x, (0, extra)) for x in (grad_out, out))
    grads = kernel.backward(grad_out, inputs.q, inputs.k, inputs.v, out, lse.t(), **inputs.settings)
    dq, dk, dv = (x[..., :D].to(lse.dtype) for x in grads)
    dq = rotate_back([dq], inputs.cos_q, inputs.sin_q)
    return dq, rotate_back([dk], inputs.cos_k, inputs.sin_k), dv.contiguous()
