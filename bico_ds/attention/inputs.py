"""The inputs and results that every way to compute attention takes and gives.

Shape legend: T rows, H query heads, N key heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]  # of raw q [T, H, D], k and v [T, N, D]


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Raw q [T, H, D], k, v [T, N, D], and cos, sin [T, D] in q's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    scale: float
    causal: bool

    def span_rows(self, rows: Tensor) -> AttentionInputs:
        """Those of some rows, int64 [P], as a causal batch."""
        q, k, v, cos, sin = (x.index_select(0, rows) for x in (self.q, self.k, self.v, self.cos, self.sin))
        return AttentionInputs(q=q, k=k, v=v, cos=cos, sin=sin, scale=self.scale, causal=True)


@dataclass(frozen=True, kw_only=True)
class AttentionResults:
    """`out` [T, H, D] in q's dtype, and `lse` [T, H] in at least fp32.

    `lse` is the log-sum-exp of each query's scores, which the backward pass needs.
    """

    out: Tensor
    lse: Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The softmax, lse and merges run in at least fp32."""
    return torch.promote_types(dtype, torch.float32)
