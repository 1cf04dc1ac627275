"""The flash-attn-3 package (FlashAttention-3, compiled for Hopper), opt-in.

Its operators `flash_attn_3::fwd` and `bwd`, as `hopper/flash_api_stable.cpp` defines them, called by keyword. They are those
that torch's `activate_flash_attention_impl("FA3")` puts in the place of its own, for the whole process: called directly they
leave `aten-cuda`, and what else computes attention in this process, as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bico_ds.attention.kernels.flash_limits import flash3_refusal
from bico_ds.native.packages import install_refusal


class FlashAttn3:
    """`CausalKernel` on `torch.ops.flash_attn_3.fwd` and `bwd`."""

    name = "flash-attn-3"
    hides_keys = False

    def refusal(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        # Before 3.0.0 few arguments of the operators had defaults.
        return flash3_refusal(dtype, head_dim, device) or install_refusal(
            "flash-attn-3",
            "flash_attn_interface",
            oldest="3.0.0",
            wheels="https://download.pytorch.org/whl/flash-attn-3/",
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
        out, lse, *_ = _operators().fwd(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            is_causal=True,
            # By a heuristic for few queries it would split the keys, and sum their parts in fp32 buffers.
            num_splits=1,
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
        # What it returns differs between releases; what it writes does not.
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _operators().bwd(
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
            softmax_scale=scale,
            is_causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def _operators() -> Any:
    """`fwd` and `bwd`, which torch knows once the package is imported."""
    import flash_attn_interface  # noqa: F401

    return torch.ops.flash_attn_3
