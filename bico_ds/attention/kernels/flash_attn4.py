"""The flash-attn-4 package (CuTe DSL; `pip install bico_ds[flash4]`), opt-in, Hopper and newer.

Signatures as in ``flash_attn/cute/interface.py``. It wants None, never -1, for an unbounded window; only
arguments that every release of its first year has are passed, by keyword.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from bico_ds.attention.kernels.flash_limits import flash4_refusal


class FlashAttn4:
    """`CausalKernel` on `flash_attn.cute.interface._flash_attn_fwd` and `_flash_attn_bwd`."""

    name = "flash-attn-4"
    hides_keys = False

    def refusal(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        return _install_refusal() or flash4_refusal(dtype, head_dim, device)

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
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse = _flash_attn_fwd(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            softmax_scale=scale,
            causal=True,
            return_lse=True,
        )[:2]
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
        from flash_attn.cute.interface import _flash_attn_bwd

        dq, dk, dv = _flash_attn_bwd(
            q=q,
            k=k,
            v=v,
            out=out.contiguous(),
            dout=grad_out.contiguous(),
            lse=lse.contiguous(),
            softmax_scale=scale,
            causal=True,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
        )[:3]
        return dq, dk, dv


def _install_refusal() -> str | None:
    installed = importlib.util.find_spec("flash_attn") is not None
    if not installed or importlib.util.find_spec("flash_attn.cute") is None:
        return "is not installed (pip install 'bico_ds[flash4]')"
    return None
