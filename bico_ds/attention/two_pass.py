"""Bidirectional attention of kept rows as two plain causal flash passes, merged by log-sum-exp.

Pass 1: causal over forward-rotated q and k (keys up to the query, diagonal included). Pass 2: the strictly
anti-causal part over reverse-rotated q and k, as a causal pass over flipped rows. Backward hands each kernel
the *merged* out and lse (as ring attention does, arXiv 2310.01889): ``exp(s - lse)`` is then the weight
within the one softmax.

Shape legend: N kept rows, M flipped rows, H query heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.plan import AttentionPlan
from bico_ds.attention.rotation import rotate_back, rotate_forward, rotate_reverse


def two_pass_forward(
    kernel: CausalKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, Dh] and lse [Hq, N] of a plan's kept rows. q [N, Hq, Dh], k, v [N, Hkv, Dh], cos, sin [N,
    Dh]."""
    cos, sin = cos[:, None], sin[:, None]
    out, lse = kernel.forward(
        rotate_forward(q, cos, sin),
        rotate_forward(k, cos, sin),
        v.contiguous(),
        cu_seqlens=plan.cu_seqlens,
        max_seqlen=plan.max_seqlen,
        scale=scale,
    )
    if plan.flip_max_seqlen == 0:
        return out, lse
    queries, keys = plan.flip_rows, plan.flip_rows + 1
    out2, lse2 = kernel.forward(
        rotate_reverse(q[queries], cos[queries], sin[queries]),
        rotate_reverse(k[keys], cos[keys], sin[keys]),
        v[keys],
        cu_seqlens=plan.flip_cu_seqlens,
        max_seqlen=plan.flip_max_seqlen,
        scale=scale,
    )
    return merge(out, lse, out2, lse2, queries)


def merge(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax from two: ``out [N, H, D], lse [H, N]`` updated in place at ``rows`` [M] by ``out2 [M, H,
        D], lse2``.

    Computed in lse's dtype. Written as differences, so that lse of any distance neither overflows nor loses
    the base.
    """
    base, base_lse = out[rows].to(lse.dtype), lse[:, rows]
    difference = base_lse - lse2
    share = torch.sigmoid(-difference).t().unsqueeze(-1)
    out[rows] = base.sub_(share * (base - out2)).to(out.dtype)
    lse[:, rows] = base_lse - logsigmoid(difference)
    return out, lse


def two_pass_backward(
    kernel: CausalKernel,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of raw q, k, v in lse's dtype; arguments as `two_pass_forward` took and gave them."""
    cos, sin = cos[:, None], sin[:, None]
    grads = kernel.backward(
        grad_out,
        rotate_forward(q, cos, sin),
        rotate_forward(k, cos, sin),
        v.contiguous(),
        out,
        lse,
        cu_seqlens=plan.cu_seqlens,
        max_seqlen=plan.max_seqlen,
        scale=scale,
    )
    dq, dk, dv = (x.to(lse.dtype) for x in grads)
    dq, dk = rotate_back([dq], cos, sin), rotate_back([dk], cos, sin)
    if plan.flip_max_seqlen == 0:
        return dq, dk, dv
    queries, keys = plan.flip_rows, plan.flip_rows + 1
    grads = kernel.backward(
        grad_out[queries],
        rotate_reverse(q[queries], cos[queries], sin[queries]),
        rotate_reverse(k[keys], cos[keys], sin[keys]),
        v[keys],
        out[queries],
        lse[:, queries].contiguous(),
        cu_seqlens=plan.flip_cu_seqlens,
        max_seqlen=plan.flip_max_seqlen,
        scale=scale,
    )
    dq2, dk2, dv2 = (x.to(lse.dtype) for x in grads)
    dq.index_add_(0, queries, rotate_back([dq2], cos[queries], -sin[queries]))
    dk.index_add_(0, keys, rotate_back([dk2], cos[keys], -sin[keys]))
    dv.index_add_(0, keys, dv2)
    return dq, dk, dv
