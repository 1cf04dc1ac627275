"""Which backend runs: the one named, or with `auto` the first that can; the log has which, and why."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import replace

import torch

from bico_ds.attention.backend import Backend
from bico_ds.attention.fused import fused_refusal
from bico_ds.attention.kernels.aten_cuda import AtenCuda
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.kernels.cpu_flash import CpuFlash
from bico_ds.attention.kernels.flash_attn2 import FlashAttn2
from bico_ds.attention.kernels.flash_attn3 import FlashAttn3
from bico_ds.attention.kernels.flash_attn4 import FlashAttn4
from bico_ds.attention.layout import (
    CPU_FUSED_POLICY,
    CPU_HALF_POLICY,
    CPU_POLICY,
    CUDA_POLICY,
    TILES_POLICY,
    LayoutPolicy,
)
from bico_ds.attention.measured_policy import (
    MeasuredPolicy,
    choose_policy,
    order_by_speed,
    read_measured_policy,
)
from bico_ds.attention.passes import HIDDEN_COLUMNS, TORCH_PASSES, Passes
from bico_ds.attention.triton.ops import tiling_on, triton_refusal
from bico_ds.attention.triton.passes import TRITON_PASSES
from bico_ds.attention.triton.self_check import blocks_objection, passes_objection

logger = logging.getLogger(__name__)

KERNELS: dict[str, CausalKernel] = {
    k.name: k for k in (FlashAttn2(), AtenCuda(), CpuFlash(), FlashAttn3(), FlashAttn4())
}
TRITON = "triton"  # the Triton kernels alone, without a flash kernel
AUTO_ORDER = ("flash-attn", "aten-cuda", "cpu-flash")


@functools.cache
def resolve(backend: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> Backend | None:
    """The backend that serves such inputs; None for the oracle. Decided, and with `auto` logged, once per combination.

    Raises `ValueError` for an unknown backend, and for one that cannot serve them, with the reason and those that can.
    """
    if backend == "oracle":
        return None
    if backend not in ("auto", *KERNELS, TRITON):
        known = ", ".join(("auto", *KERNELS, TRITON, "oracle"))
        raise ValueError(f"unknown attention backend {backend!r}: choose one of {known}")
    refusals = {name: kernel.refusal(dtype, head_dim, device) for name, kernel in KERNELS.items()}
    refusals[TRITON] = triton_refusal(dtype, head_dim, device)
    able = [name for name, refusal in refusals.items() if refusal is None]
    if backend == "auto":
        return _auto(refusals, dtype, head_dim, device)
    if refusals[backend] is not None:
        instead = (
            f"use one of: {', '.join(able)}"
            if able
            else "'auto' would use dense tiles (slow on long documents)"
        )
        raise ValueError(f"attention backend {backend!r} {refusals[backend]}; {instead}")
    if backend == TRITON:
        policy = replace(TILES_POLICY, blocks=tiling_on(device, head_dim).blocks)
        return Backend(kernel=KERNELS[AUTO_ORDER[0]], policy=policy)
    kernel, refusal = KERNELS[backend], refusals[TRITON]
    policy, _ = _policy(kernel, dtype, head_dim, device, without_triton="was not asked for")
    passes, _ = _passes(kernel, dtype, head_dim, device, without_triton=refusal)
    return Backend(kernel=kernel, policy=policy, passes=passes)


def _auto(
    refusals: dict[str, str | None], dtype: torch.dtype, head_dim: int, device: torch.device
) -> Backend:
    """The first that can run, of the fastest by measurement or of `AUTO_ORDER`; else tiles alone (fp32 on CUDA, old GPUs).

    Logs which it is, and why those before it were passed over.
    """
    passed_over: list[str] = []
    order, why = _order(refusals, dtype, head_dim, device)
    for name in order:
        if refusals[name] is not None:
            passed_over.append(f"{name} {refusals[name]}")
            continue
        kernel, refusal = KERNELS[name], refusals[TRITON]
        passes, note_of_passes = _passes(kernel, dtype, head_dim, device, without_triton=refusal)
        if refusal is None and device.type == "cuda":
            refusal = blocks_objection(dtype, head_dim, device)
        policy, note = _policy(kernel, dtype, head_dim, device, without_triton=refusal)
        reason = note if device.type == "cpu" else "; ".join([*passed_over, *why, note, *note_of_passes])
        inputs = f"{device}, {str(dtype).removeprefix('torch.')}, head dimension {head_dim}"
        logger.info("attention backend: %s for %s (%s)", name, inputs, reason)
        return Backend(kernel=kernel, policy=policy, passes=passes)
    logger.warning("attention backend: dense tiles, slow on long documents: %s", "; ".join(passed_over))
    return Backend(kernel=KERNELS[AUTO_ORDER[0]], policy=TILES_POLICY)


def _order(
    refusals: dict[str, str | None], dtype: torch.dtype, head_dim: int, device: torch.device
) -> tuple[tuple[str, ...], list[str]]:
    """In which order `auto` tries the flash kernels; and why, where that was measured."""
    if device.type != "cuda" or all(refusals[name] is not None for name in KERNELS):
        return AUTO_ORDER, []
    return order_by_speed(_measured(device), AUTO_ORDER, dtype=dtype, head_dim=head_dim)


def _measured(device: torch.device) -> MeasuredPolicy | None:
    """What was measured on such a GPU; None: nothing was, or it is the meta device, which has no architecture."""
    return read_measured_policy(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def _passes(
    kernel: CausalKernel,
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    *,
    without_triton: str | None,
) -> tuple[Passes, list[str]]:
    """What surrounds the kernel's passes: Triton kernels on GPUs, once they are right there; and else why they do not."""
    if device.type == "cpu":
        return TORCH_PASSES, []
    objection = without_triton
    if objection is None and device.type == "cuda":
        objection = passes_objection(kernel, dtype, head_dim, device)
    if objection is None:
        return TRITON_PASSES, []
    return TORCH_PASSES, [f"torch's operations around the passes: triton {objection}"]


def _policy(
    kernel: CausalKernel,
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    *,
    without_triton: str | None,
) -> tuple[LayoutPolicy, str]:
    """The policy on such a device, and the reason for it. `without_triton`: why the Triton kernels may not help."""
    if device.type != "cpu":
        can_hide = kernel.refusal(dtype, head_dim + HIDDEN_COLUMNS, device) is None
        return choose_policy(
            _measured(device),
            CUDA_POLICY if can_hide else replace(CUDA_POLICY, hidden_cost=math.inf),
            kernel=kernel.name,
            dtype=dtype,
            head_dim=head_dim,
            blocks=tiling_on(device, head_dim).blocks if without_triton is None else None,
            refusal=without_triton,
        )
    refusal = fused_refusal(dtype)
    if refusal is None:
        return CPU_FUSED_POLICY, "all rows through the fused kernel"
    policy = CPU_HALF_POLICY if dtype.itemsize == 2 else CPU_POLICY
    return policy, f"short documents and live rows on torch operations: the fused kernel {refusal}"
