"""What the two-pass op asks of a kernel: plain causal attention over packed documents, with its log-sum-exp.

Shape legend: N packed rows, D documents, Hq query heads, Hkv key heads (Hq is a multiple), Dh head dimension.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

HIDDEN_SCORE = -4000.0  # added to the score of a hidden key: its weight is exactly 0 in every dtype


class CausalKernel(Protocol):
    """Causal varlen attention. q [N, Hq, Dh], k and v [N, Hkv, Dh], already rotated, contiguous.

    `cu_seqlens` int32 [D+1] bounds the documents, all of length >= 1; `max_seqlen` is the length of the longest.
    """

    name: str
    # Whether it takes `hidden`; else that is never given, and a wider head hides the keys.
    hides_keys: bool

    def refusal(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        """Why this kernel cannot serve such inputs, in one clause; None where it can."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return out [N, Hq, Dh] in q's dtype and lse [Hq, N] in at least fp32.

        hidden bool [N]: keys that get no weight.
        """

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k, v.

        `out` and `lse` may belong to a softmax over more keys than these (the merged ones): the kernel computes
        `P = exp(scale·qkᵀ - lse)` and `dS = P·(dP - rowsum(grad_out·out))` from them.
        """
