"""RMSNorm and SwiGLU in one pass over memory each, for packed batches on a CPU.

Hugging Face's modules make many passes over temporaries of the activations' size (docs/benchmarks/step.md has the times).
Forward and backward here are kernels of `bico_ds/native`. Where these cannot run (another device, dtype or machine, no
compiler), and where they are not asked for, the modules are Hugging Face's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bico_ds.model.families import FAMILIES
from bico_ds.native.library import NATIVE_DTYPES, native_refusal


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x², -1) + eps)`: x [..., E] and weight [E] of one dtype, bf16 or fp32, on the CPU.

    Sums in fp32; the normalised x is rounded to its dtype before the product, as Hugging Face does.
    """
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (arXiv 2002.05202): two tensors of one shape and dtype, bf16 or fp32, on the CPU."""
    return _SwiGLU.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, inverse = torch.empty_like(rows), rows.new_empty(len(rows), dtype=torch.float32)
        torch.ops.bico_ds.rms_norm_forward(rows.contiguous(), weight, eps, out, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        rows, grad = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, grad_out))
        dx, dweight = torch.empty_like(rows), torch.empty_like(weight)
        torch.ops.bico_ds.rms_norm_backward(grad, rows, weight, inverse, dx, dweight)
        return dx.view(x.shape), dweight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        torch.ops.bico_ds.swiglu_forward(gate, up, out)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        torch.ops.bico_ds.swiglu_backward(grad_out.contiguous(), gate, up, dgate, dup)
        return dgate, dup


def _is_served(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in NATIVE_DTYPES and native_refusal() is None


class _FusedNorm:
    """Mixed in before a Hugging Face RMSNorm; adds the keyword `fused` to its forward."""

    def forward(self: Any, hidden_states: Tensor, *, fused: bool = False) -> Tensor:
        if fused and _is_served(hidden_states) and self.weight.dtype == hidden_states.dtype:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)  # type: ignore[misc]


class _FusedMLP:
    """Mixed in before a Hugging Face gated MLP; adds the keyword `fused` to its forward."""

    def forward(self: Any, x: Tensor, *, fused: bool = False) -> Tensor:
        if fused and _is_served(x) and self.config.hidden_act == "silu":
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return super().forward(x)  # type: ignore[misc]


def _fused_classes() -> dict[type, type]:
    """By a class of Hugging Face, ours."""
    plain = [(f.norm, _FusedNorm) for f in FAMILIES.values()] + [
        (f.mlp, _FusedMLP) for f in FAMILIES.values()
    ]
    return {cls: type(f"Fused{cls.__name__}", (mixin, cls), {}) for cls, mixin in plain}


_FUSED_CLASS = _fused_classes()


def swap_elementwise(model: nn.Module) -> None:
    """Change the class of every RMSNorm and gated MLP, in place; weights stay."""
    for module in model.modules():
        module.__class__ = _FUSED_CLASS.get(type(module), type(module))
