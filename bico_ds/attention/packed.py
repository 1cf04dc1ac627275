"""The op: ``packed_attention``."""

from __future__ import annotations

from torch import Tensor

from bico_ds.attention.oracle import oracle_attention
from bico_ds.attention.plan import AttentionPlan


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one packed batch, causal or bidirectional as the plan says.

    q [T, Hq, Dh], k and v [T, Hkv, Dh], un-rotated; cos, sin [T, Dh] as Hugging Face's rotary embedding gives them
    (halves duplicated, rotate_half convention). T = plan.num_rows. Returns out [T, Hq, Dh].
    """
    return oracle_attention(q, k, v, cos, sin, plan, scale)
