"""RMSNorm, with what a layer adds to its rows, and SwiGLU in one pass over memory each, for packed batches.

Who computes them is `elementwise_kernels.py`. Where nobody there can (another device, dtype or machine, no compiler, no
liger-kernel), and where they are not asked for, the modules are Hugging Face's own. docs/benchmarks/step.md has times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bico_ds.model.elementwise_kernels import ElementwiseKernels, kernels_for
from bico_ds.model.families import FAMILIES


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: ElementwiseKernels) -> Tensor:
    """`weight * x / sqrt(mean(x², -1) + eps)`: x [..., E] and weight [E] of one dtype, which the kernels serve."""
    return _RMSNorm.apply(x, weight, eps, kernels)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kernels: ElementwiseKernels
) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of the sum, the sum of x and residual), which are alike. The sum is what the backward pass keeps.

    One backward pass adds the gradient that the sum has by itself to that through the norm.
    """
    return _AddRMSNorm.apply(x, residual, weight, eps, kernels)


def swiglu(gate: Tensor, up: Tensor, kernels: ElementwiseKernels) -> Tensor:
    """`silu(gate) * up` (arXiv 2002.05202): two tensors [..., F] of one dtype, which the kernels serve.

    The backward pass may write over both; nothing else may need them then.
    """
    return _SwiGLU.apply(gate, up, kernels)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: ElementwiseKernels) -> Tensor:
        out, inverse = kernels.norm(_rows(x), weight, eps)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = ctx.kernels.norm_backward(_rows(grad), None, _rows(x), weight, inverse)
        return dx.view(x.shape), dweight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, kernels: ElementwiseKernels
    ) -> tuple[Tensor, Tensor]:
        out, total, inverse = kernels.add_norm(_rows(x), _rows(residual), weight, eps)
        out, total = out.view(x.shape), total.view(x.shape)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, inverse)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return grad_sum, grad_sum, None, None, None
        total, weight, inverse = ctx.saved_tensors
        own = None if grad_sum is None else _rows(grad_sum)
        dx, dweight = ctx.kernels.norm_backward(_rows(grad), own, _rows(total), weight, inverse)
        dx = dx.view(total.shape)
        return dx, dx, dweight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: ElementwiseKernels) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate, up)
        return kernels.gate(_rows(gate), _rows(up)).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = ctx.kernels.gate_backward(_rows(grad), _rows(gate), _rows(up))
        # Where they are written over gate and up, those are no part of a graph any more.
        return dgate.detach().view(gate.shape), dup.detach().view(gate.shape), None


def norm_kernels(norm: Any, x: Tensor) -> ElementwiseKernels | None:
    """Those that a Hugging Face RMSNorm has for x where it is asked to be fused; None: it runs as it is."""
    return kernels_for(x.dtype, x.device) if norm.weight.dtype == x.dtype else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


class _FusedNorm:
    """Mixed in before a Hugging Face RMSNorm; adds the keywords `residual` and `fused` to its forward.

    With `residual` it returns (the norm of the sum, the sum).
    """

    def forward(
        self: Any, hidden_states: Tensor, *, residual: Tensor | None = None, fused: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        kernels = norm_kernels(self, hidden_states) if fused else None
        if residual is None:
            if kernels is None:
                return super().forward(hidden_states)  # type: ignore[misc]
            return rms_norm(hidden_states, self.weight, self.variance_epsilon, kernels)
        if kernels is None:
            total = residual + hidden_states
            return super().forward(total), total  # type: ignore[misc]
        return add_rms_norm(hidden_states, residual, self.weight, self.variance_epsilon, kernels)


class _FusedMLP:
    """Mixed in before a Hugging Face gated MLP; adds the keyword `fused` to its forward."""

    def forward(self: Any, x: Tensor, *, fused: bool = False) -> Tensor:
        kernels = kernels_for(x.dtype, x.device) if fused and self.config.hidden_act == "silu" else None
        if kernels is None:
            return super().forward(x)  # type: ignore[misc]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), kernels))


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
