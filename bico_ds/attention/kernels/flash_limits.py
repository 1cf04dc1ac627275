"""What the CUDA flash kernels cannot take: each function returns the reason, as a clause, or None.

On the meta device, which has shapes alone, they take what the newest GPU takes: so a CPU shows how a model runs there.
"""

from __future__ import annotations

import torch


def flash2_refusal(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """FlashAttention-2: fp16 and bf16, head dimension a multiple of 8 up to 256, Ampere or newer."""
    return _cuda_refusal(dtype, device, oldest=(8, 0)) or head_dim_refusal(head_dim, 8, 256)


def flash3_refusal(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """FlashAttention-3: fp16 and bf16, head dimension a multiple of 8 up to 256, 192 where deterministic; Hopper alone."""
    largest = 192 if torch.are_deterministic_algorithms_enabled() else 256
    refusal = _cuda_refusal(dtype, device, oldest=(9, 0)) or head_dim_refusal(head_dim, 8, largest)
    if refusal is None and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] > 9:
        return f"is compiled for Hopper alone, not for {torch.cuda.get_device_name(device)}"
    return refusal


def flash4_refusal(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """FlashAttention-4: fp16 and bf16, head dimension a multiple of 8 up to 128, Hopper or newer (so its backward)."""
    return _cuda_refusal(dtype, device, oldest=(9, 0)) or head_dim_refusal(head_dim, 8, 128)


def _cuda_refusal(dtype: torch.dtype, device: torch.device, oldest: tuple[int, int]) -> str | None:
    if device.type not in ("cuda", "meta"):
        return f"runs on CUDA tensors, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "meta":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < oldest:
        name = torch.cuda.get_device_name(device)
        return f"needs compute capability {oldest[0]}.{oldest[1]}, {name} has {capability[0]}.{capability[1]}"
    return None


def head_dim_refusal(head_dim: int, multiple: int, largest: int) -> str | None:
    if head_dim % multiple or head_dim > largest:
        return f"takes head dimensions that are multiples of {multiple} up to {largest}, not {head_dim}"
    return None
