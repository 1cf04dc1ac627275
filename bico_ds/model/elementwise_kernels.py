"""Who computes norms and gates: `bico_ds/native` on a CPU, liger-kernel on CUDA; the meta device has shapes alone.

Each `ElementwiseKernels` makes one pass over memory, where the modules of Hugging Face make many over temporaries of the
activations' size. All of them take rows [N, width], contiguous, and give such rows of the same dtype; sums are in fp32,
and the normed x is rounded to its dtype before the product with the weight, as Hugging Face's Llama does.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bico_ds.common.traffic import Traffic, report
from bico_ds.native.library import NATIVE_DTYPES, native_refusal
from bico_ds.native.packages import install_refusal
from bico_ds.native.triton_kernels import triton_missing

logger = logging.getLogger(__name__)


class ElementwiseKernels(Protocol):
    """RMSNorm and SwiGLU over rows. `inverse`: 1 / sqrt(mean(x²) + eps) of each row, fp32 [N]."""

    name: str

    def refusal(self, dtype: torch.dtype) -> str | None:
        """Why rows of this dtype cannot be served here, as a clause; None where they can."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(weight · x · inverse, inverse)."""

    def add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(the norm of the sum, the sum of x and residual, inverse)."""

    def norm_backward(
        self, grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x (after `add_norm` the sum) and weight; `grad_sum`: of the sum itself, added to x's."""

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up, the former rounded to its dtype before the product."""

    def gate_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up, which may be written over gate and up."""


class NativeKernels:
    """C++ of `bico_ds/native/elementwise.cpp`."""

    name = "the fused CPU kernels"

    def refusal(self, dtype: torch.dtype) -> str | None:
        return "take bf16 and fp32" if dtype not in NATIVE_DTYPES else native_refusal()

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, inverse = torch.empty_like(x), _per_row(x)
        torch.ops.bico_ds.rms_norm_forward(x, weight, eps, out, inverse)
        return out, inverse

    def add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = x + residual
        out, inverse = self.norm(total, weight, eps)
        return out, total, inverse

    def norm_backward(
        self, grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        torch.ops.bico_ds.rms_norm_backward(grad, x, weight, inverse, dx, dweight)
        return dx if grad_sum is None else dx.add_(grad_sum), dweight

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        torch.ops.bico_ds.swiglu_forward(gate, up, out)
        return out

    def gate_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        torch.ops.bico_ds.swiglu_backward(grad, gate, up, dgate, dup)
        return dgate, dup


class LigerKernels:
    """Triton kernels of liger-kernel (`pip install bico_ds[liger]`), by what its autograd functions call.

    Signatures as in `liger_kernel/ops/` at 0.8.0. Not by those functions: they would keep a sum's inputs apart from the
    sum that a checkpointed layer keeps, and a call without a gradient of the sum is not theirs.
    """

    name = "liger-kernel"
    # Llama's casts (`_CASTING_MODE_LLAMA`); the weight as it is.
    _LIKE_LLAMA: ClassVar[dict[str, float]] = {"offset": 0.0, "casting_mode": 0}

    def refusal(self, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"takes bf16, fp16 and fp32, not {str(dtype).removeprefix('torch.')}"
        return triton_missing(torch.device("cuda")) or install_refusal(
            "liger-kernel", "liger_kernel.ops.fused_add_rms_norm", extra="liger", oldest="0.8"
        )

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rms_norm import rms_norm_forward

        with torch.cuda.device_of(x):
            out, _, inverse, *_ = rms_norm_forward(X=x, W=weight, eps=eps, row_mode=None, **self._LIKE_LLAMA)
        return out, inverse

    def add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

        with torch.cuda.device_of(x):
            out, total, inverse, *_ = fused_add_rms_norm_forward(
                X=x, R=residual, W=weight, eps=eps, **self._LIKE_LLAMA
            )
        return out, total, inverse

    def norm_backward(
        self, grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward
        from liger_kernel.ops.rms_norm import rms_norm_backward
        from liger_kernel.ops.utils import calculate_settings

        block, warps = calculate_settings(x.shape[1])
        # Not in place: others may hold this gradient.
        shared = {"BLOCK_SIZE": block, "num_warps": warps, "in_place": False, **self._LIKE_LLAMA}
        with torch.cuda.device_of(x):
            if grad_sum is None:
                return rms_norm_backward(dY=grad, X=x, W=weight, RSTD=inverse, row_mode=None, **shared)
            dx, _, dweight = fused_add_rms_norm_backward(
                dY=grad, dS_out=grad_sum, S=x, W=weight, RSTD=inverse, num_stages=2, **shared
            )
            return dx, dweight

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import swiglu_forward

        with torch.cuda.device_of(gate):
            return swiglu_forward(a=gate, b=up)[2]

    def gate_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.swiglu import swiglu_backward

        with torch.cuda.device_of(gate):
            found = swiglu_backward(a=gate, b=up, dc=grad)
        # It has written over both unseen; a second backward pass must fail, not read gradients as activations.
        torch.autograd.graph.increment_version((gate, up))
        return found


class StatedKernels:
    """On the meta device: the shapes that liger-kernel's results have, and the `Traffic` of its launches."""

    name = "liger-kernel's shapes"
    _PROGRAMS = 132  # of a backward pass, each with a row of the weight's gradient in fp32: one per SM, here an H100's

    def refusal(self, dtype: torch.dtype) -> str | None:
        return None if dtype in (torch.bfloat16, torch.float16, torch.float32) else "has no such kernel"

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, inverse = torch.empty_like(x), _per_row(x)
        _state("norm forward", 1, read=(x, weight), written=(out, inverse))
        return out, inverse

    def add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, total, inverse = torch.empty_like(x), torch.empty_like(x), _per_row(x)
        _state("norm forward", 1, read=(x, residual, weight), written=(out, total, inverse))
        return out, total, inverse

    def norm_backward(
        self, grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        parts = x.new_empty(self._PROGRAMS, x.shape[1], dtype=torch.float32)
        summed = parts[0]
        # Its launch, and the sum of the parts; a cast of that, unless it is fp32; without a sum, zeros before it.
        casts, fills = (weight.dtype != torch.float32) * 1, (grad_sum is None) * 1
        _state(
            "norm backward",
            2 + casts + fills,
            read=(
                grad,
                *([] if grad_sum is None else [grad_sum]),
                x,
                weight,
                inverse,
                parts,
                *[summed] * casts,
            ),
            written=(*[dx] * fills, dx, parts, summed, *[dweight] * casts),
        )
        return dx, dweight

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        _state("gate forward", 1, read=(gate, up), written=(out,))
        return out

    def gate_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        _state("gate backward", 1, read=(grad, gate, up), written=(gate, up))
        return gate, up


def _per_row(x: Tensor) -> Tensor:
    return x.new_empty(len(x), dtype=torch.float32)


def _state(op: str, launches: int, *, read: tuple[Tensor, ...], written: tuple[Tensor, ...]) -> None:
    moved = (sum(tensor.nbytes for tensor in tensors) for tensors in (read, written))
    report(Traffic(op=op, launches=launches, bytes_read=next(moved), bytes_written=next(moved)))


KERNELS: dict[str, ElementwiseKernels] = {
    "cpu": NativeKernels(),
    "cuda": LigerKernels(),
    "meta": StatedKernels(),
}
"""By the type of a device."""

_switched_off = False


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, norms and gates are Hugging Face's own modules on every device: what the kernels are compared with."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def kernels_for(dtype: torch.dtype, device: torch.device) -> ElementwiseKernels | None:
    """Those that serve rows of this dtype; None: Hugging Face's modules do. On CUDA the log says once which, and why."""
    return None if _switched_off else _kernels_on(device.type, dtype)


@functools.cache
def _kernels_on(device: str, dtype: torch.dtype) -> ElementwiseKernels | None:
    kernels = KERNELS.get(device)
    refusal = f"nothing of ours runs on {device}" if kernels is None else kernels.refusal(dtype)
    if device == "cuda" and kernels is not None:
        plain = f"Hugging Face's own modules, in many passes over memory: {kernels.name} {refusal}"
        logger.info("norms and gates: %s", plain if refusal else kernels.name)
    return kernels if refusal is None else None
