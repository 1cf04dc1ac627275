"""The flash-attn package, 2.8 and newer (`pip install bico_ds[flash]`).

Signatures as in `flash_attn/flash_attn_interface.py` at v2.8: every argument of the backward is required
up to `deterministic`; it writes into the dq, dk, dv it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bico_ds.attention.kernels.flash_limits import flash2_refusal
from bico_ds.native.packages import install_refusal


class FlashAttn2:
    """`CausalKernel` on `flash_attn_interface._flash_attn_varlen_forward` and `_backward`."""

    name = "flash-attn"
    hides_keys = False

    def refusal(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        return flash2_refusal(dtype, head_dim, device) or install_refusal(
            "flash-attn", "flash_attn.flash_attn_interface", extra="flash", oldest="2.8"
        )

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
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, _, _ = _flash_attn_varlen_forward(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
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
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            dout=grad_out.contiguous(),
            q=q,
            k=k,
            v=v,
            out=out.contiguous(),
            softmax_lse=lse.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=None,
        )
        return dq, dk, dv
