"""How fast a device multiplies matrices: a pre-flight compares it, and a CPU's utilization is measured by it."""

from __future__ import annotations

import time

import torch

_MATRIX = {"cuda": 4096, "cpu": 512}


def multiply(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> tuple[float, bool]:
    """FLOP/s of products of square matrices of 512 rows on a CPU, 4,096 on CUDA, and whether the last product is right.

    Multiplies for `seconds` seconds; every element of the product is 1.
    """
    size = _MATRIX[device.type]
    ones = torch.ones(size, size, dtype=dtype, device=device)
    product = ones @ (ones / size)  # exact, since `size` is a power of two
    synchronize(device)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        product = ones @ (ones / size)
        synchronize(device)
        count += 1
    return count * 2 * size**3 / elapsed, bool((product == 1).all())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
