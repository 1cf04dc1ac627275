"""The flash-attn-4 package (CuTe DSL; `pip install bico_ds[flash4]`), opt-in, Hopper and newer.

Signatures as in `flash_attn/cute/interface.py`. It wants None, never -1, for an unbounded window. Only arguments that every
release from 4.0.0b10 to b36 has are passed, by keyword; before b10 there was no varlen backward on Hopper. Torch's
`activate_flash_attention_impl("FA4")` calls these same functions, but swaps the whole process's attention for it, and
leaves out the longest document in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bico_ds.attention.kernels.flash_limits import flash4_refusal
from bico_ds.native.packages import install_refusal


class FlashAttn4:
    """`CausalKernel` on `flash_attn.cute.interface._flash_attn_fwd` and `_flash_attn_bwd`."""

    name = "flash-attn-4"
    hides_keys = False

    def refusal(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        # By its distribution's name: flash-attn 2.8 ships an older flash_attn.cute with another interface.
        return flash4_refusal(dtype, head_dim, device) or install_refusal(
            "flash-attn-4", "flash_attn.cute.interface", extra="flash4", oldest="4.0.0b10"
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
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse = _flash_attn_fwd(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            # Else it takes all rows for the longest document, and plans tiles and semaphores for that.
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
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
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            **_deterministic(),
        )[:3]
        return dq, dk, dv


def _deterministic() -> dict[str, bool]:
    """The argument, only where the user asks for determinism: kernels of some GPUs refuse the argument."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
