"""The report of one rank on its machine, a dict that JSON can hold; `judge` compares the reports of all ranks."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch

from bico_ds.cluster.preflight.inputs import (
    code_fingerprint,
    damaged_stores,
    input_fingerprints,
    recipe_fingerprint,
)
from bico_ds.config.schema import Recipe
from bico_ds.runtime import host_memory
from bico_ds.runtime.run_folder import RunFolder, provenance

_MATRIX = {"cuda": 4096, "cpu": 512}


def collect(recipe: Recipe, run: Path, *, rank: int, local_rank: int) -> dict[str, Any]:
    """This rank's report. What is the same for all ranks of a node is in the report of its first rank only."""
    report: dict[str, Any] = {
        "rank": rank,
        "host": socket.gethostname(),
        "device": inspect_device(local_rank),
        "host_memory_bytes": host_memory.memory_with_swap(),
    }
    report["versions"] = provenance()["versions"] | {
        "python": platform.python_version(),
        "CUDA": torch.version.cuda,
    }
    if local_rank == 0:
        report["same"] = {"program": code_fingerprint(), "recipe": recipe_fingerprint(recipe)}
        report["inputs"] = input_fingerprints(recipe)
        report["damaged"] = list(damaged_stores(recipe))
        checkpoints = RunFolder(run).checkpoints
        written = checkpoints if checkpoints.is_dir() else run
        report["disk_free_bytes"] = shutil.disk_usage(written).free if written.is_dir() else None
    return report


def inspect_device(local_rank: int) -> dict[str, Any]:
    """The device of a rank: name, GPU memory in bytes, TFLOP/s, and whether a product with a known result is right."""
    allocated = int(os.environ.get("SLURM_GPUS_ON_NODE", "0") or 0)
    report: dict[str, Any] = {"allocated": allocated, "visible": torch.cuda.device_count()}
    if report["visible"] <= local_rank:
        kind, report["name"] = "cpu", platform.machine()
    else:
        kind, report["name"] = "cuda", torch.cuda.get_device_name(local_rank)
        report["memory_free_bytes"], report["memory_total_bytes"] = torch.cuda.mem_get_info(local_rank)
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    try:
        report["tflops"], report["right"] = multiply(device, _MATRIX[kind])
    except RuntimeError as error:
        report["error"] = str(error).splitlines()[0]
    return report


def multiply(device: torch.device, size: int, seconds: float = 0.3) -> tuple[float, bool]:
    """TFLOP/s of products of square matrices (bf16 on CUDA, fp32 on a CPU), and whether the last product is right.

    Multiplies `size` x `size` matrices for `seconds` seconds; every element of the product is 1.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ones = torch.ones(size, size, dtype=dtype, device=device)
    product = ones @ (ones / size)  # exact, since `size` is a power of two
    synchronize(device)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        product = ones @ (ones / size)
        synchronize(device)
        count += 1
    return count * 2 * size**3 / elapsed / 1e12 if elapsed else 0.0, bool((product == 1).all())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
