"""Torch's CPU flash attention, one call per document.

It works in blocks, so no score matrix ever exists; GQA is native, dtypes are fp32, fp64, bf16 and fp16.
The aten kernel divides by the sequence length (SIGFPE at length 0); documents here have at least one row.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bico_ds.attention.kernels.base import HIDDEN_SCORE

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuFlash:
    """`CausalKernel` on `aten::_scaled_dot_product_flash_attention_for_cpu`."""

    name = "cpu-flash"
    hides_keys = True

    def refusal(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"runs on CPU tensors, not on {device.type}"

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
        outs, lses = [], []
        for start, end in _documents(cu_seqlens):
            mask = _key_mask(hidden, start, end, q.dtype)
            out, lse = _forward(*_batched(start, end, q, k, v), 0.0, True, attn_mask=mask, scale=scale)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        return _joined(outs, 0), _joined(lses, 1)

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
        grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for start, end in _documents(cu_seqlens):
            inputs = _batched(start, end, grad_out, q, k, v, out)
            document_lse = lse[:, start:end].t().contiguous().t()[None]  # the kernel reads it as [L, H]
            mask = _key_mask(hidden, start, end, q.dtype)
            results = _backward(*inputs, document_lse, 0.0, True, attn_mask=mask, scale=scale)
            for grad, column in zip(results, grads, strict=True):
                column.append(grad[0].transpose(0, 1))
        dq, dk, dv = (_joined(column, 0) for column in grads)
        return dq, dk, dv


def _documents(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return list(itertools.pairwise(bounds))


def _batched(start: int, end: int, *tensors: Tensor) -> list[Tensor]:
    """Views [1, H, L, Dh] of the rows of one document."""
    return [x[start:end].transpose(0, 1).unsqueeze(0) for x in tensors]


def _key_mask(hidden: Tensor | None, start: int, end: int, dtype: torch.dtype) -> Tensor | None:
    """Additive mask [1, 1, 1, L] over the keys of a document, in q's dtype, as the kernel demands."""
    return None if hidden is None else (hidden[start:end].to(dtype) * HIDDEN_SCORE)[None, None, None]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
