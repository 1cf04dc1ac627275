"""Torch's own CUDA flash attention (its vendored FlashAttention-2): varlen, with native GQA; nothing to install.

Signatures as in `aten/src/ATen/native/native_functions.yaml`
(`torch.ops.aten._flash_attention_forward.default._schema` shows them). With dropout 0 the backward takes
`zeros(2, uint64)` and `empty(0)` for its two random-state arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bico_ds.attention.kernels.flash_limits import flash2_refusal


class AtenCuda:
    """`CausalKernel` on `aten::_flash_attention_forward` and `_backward`."""

    name = "aten-cuda"
    hides_keys = False

    def refusal(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        refusal = flash2_refusal(dtype, head_dim, device)
        is_built = device.type == "meta" or torch.backends.cuda.is_flash_attention_available()
        if refusal is None and not is_built:
            return "is not part of this build of torch"
        return refusal

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
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query=q,
            key=k,
            value=v,
            cum_seq_q=cu_seqlens,
            cum_seq_k=cu_seqlens,
            max_q=max_seqlen,
            max_k=max_seqlen,
            dropout_p=0.0,
            is_causal=True,
            return_debug_mask=False,
            scale=scale,
        )
        return out, lse

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
        return torch.ops.aten._flash_attention_backward(
            grad_out=grad_out.contiguous(),
            query=q,
            key=k,
            value=v,
            out=out.contiguous(),
            logsumexp=lse.contiguous(),
            cum_seq_q=cu_seqlens,
            cum_seq_k=cu_seqlens,
            max_q=max_seqlen,
            max_k=max_seqlen,
            dropout_p=0.0,
            is_causal=True,
            rng_state=torch.zeros(2, dtype=torch.uint64, device=q.device),
            unused=torch.empty(0, device=q.device),
            scale=scale,
        )
