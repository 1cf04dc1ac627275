"""The dense fp64 oracle: BICO's attention formula written down term by term. Slow; everything else is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from bico_ds.attention.plan import AttentionPlan


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    document: Tensor,
    position: Tensor,
    is_key: Tensor,
    span: Tensor | None = None,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Attention by the paper's formula (arXiv 2311.07468, section 3.2), in fp64 with materialised masks.

    q [N, Hq, Dh], k and v [N, Hkv, Dh] un-rotated; cos, sin [N, Dh] of each row's position. `document` [N], `position` [N]
    (any ordered numbers) and `is_key` bool [N] decide what is visible: query m sees key n of its own document where
    `is_key[n]`, and in causal mode only where position n <= position m. `span` int64 [N]: query m also sees key n of its own
    span where position n <= position m; -1: of none. Score of n <= m: `(R_m q_m) · (R_n k_n)`; of n > m:
    `(R_-m q_m) · (R_-n k_n)`. Differentiable. Returns [N, Hq, Dh] in q's dtype.
    """
    out_dtype, group = q.dtype, q.shape[1] // k.shape[1]
    q, k, v, cos, sin = (x.double() for x in (q, k, v, cos, sin))
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    forward_scores = torch.einsum("mhd,nhd->hmn", _rotate(q, cos, sin), _rotate(k, cos, sin))
    reverse_scores = torch.einsum("mhd,nhd->hmn", _rotate(q, cos, -sin), _rotate(k, cos, -sin))
    earlier = position[None, :] <= position[:, None]
    visible = (document[None, :] == document[:, None]) & is_key[None, :]
    if causal:
        visible = visible & earlier
    if span is not None:
        visible = visible | ((span[None, :] == span[:, None]) & (span[:, None] >= 0) & earlier)
    scores = torch.where(earlier, forward_scores, reverse_scores) * scale
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    return torch.einsum("hmn,nhd->mhd", weights, v).to(out_dtype)


def oracle_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, scale: float | None
) -> Tensor:
    """`dense_attention` over a plan's rows; shapes as `packed_attention`."""
    kept_per_document = plan.cu_seqlens.diff().long()
    kept_document = torch.repeat_interleave(kept_per_document)
    row = torch.arange(plan.num_rows, device=q.device)
    rank = row[: plan.num_kept] - plan.cu_seqlens.long()[kept_document]
    # A live row lies between two kept ones, behind the live rows before it.
    number = torch.arange(1, plan.num_live + 1, dtype=torch.float64, device=q.device)
    return dense_attention(
        q,
        k,
        v,
        cos,
        sin,
        document=torch.cat([kept_document, plan.live_document]),
        position=torch.cat([rank.double(), plan.live_split - 1 + number / (plan.num_live + 1)]),
        is_key=row < plan.num_kept,
        span=_span_of_rows(plan),
        causal=plan.mode == "causal",
        scale=scale,
    )


def _span_of_rows(plan: AttentionPlan) -> Tensor | None:
    """int64 [T]: the span of each row, -1 for kept ones; None where live rows are no keys."""
    if plan.span_cu_seqlens is None:
        return None
    spans = torch.repeat_interleave(plan.span_cu_seqlens.diff().long())
    return torch.cat([spans.new_full((plan.num_kept,), -1), spans])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Hugging Face's rotate_half convention. x [N, H, Dh], cos and sin [N, Dh]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None, :] + torch.cat([-second, first], dim=-1) * sin[:, None, :]
