"""What one rank sees of its machine, as a JSON-able dict; `judge` compares them."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch

from bico_ds.cluster.preflight.inputs import code_fingerprint, input_fingerprints, recipe_fingerprint
from bico_ds.config.schema import Recipe
from bico_ds.runtime.run_folder import provenance

_MATRIX = {"cuda": 4096, "cpu": 512}


def collect(recipe: Recipe, run: Path, *, rank: int, local_rank: int) -> dict[str, Any]:
    """All facts of this rank; what is the same for a node is taken by its first rank only."""
    facts: dict[str, Any] = {"rank": rank, "host": socket.gethostname(), "device": device_facts(local_rank)}
    facts["versions"] = provenance()["versions"] | {
        "python": platform.python_version(),
        "CUDA": torch.version.cuda,
    }
    if local_rank == 0:
        facts["same"] = {"program": code_fingerprint(), "recipe": recipe_fingerprint(recipe)}
        facts["inputs"] = input_fingerprints(recipe)
        facts["free_bytes"] = shutil.disk_usage(run).free if run.is_dir() else None
    return facts


def device_facts(local_rank: int) -> dict[str, Any]:
    """The device of a rank: name, memory in bytes, TFLOP/s, and whether a product whose result is known is right."""
    allocated = int(os.environ.get("SLURM_GPUS_ON_NODE", "0") or 0)
    facts: dict[str, Any] = {"allocated": allocated, "visible": torch.cuda.device_count()}
    if facts["visible"] <= local_rank:
        kind, facts["name"] = "cpu", platform.machine()
    else:
        kind, facts["name"] = "cuda", torch.cuda.get_device_name(local_rank)
        facts["free_bytes"], facts["total_bytes"] = torch.cuda.mem_get_info(local_rank)
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    try:
        facts["tflops"], facts["right"] = multiply(device, _MATRIX[kind])
    except RuntimeError as error:
        facts["error"] = str(error).splitlines()[0]
    return facts


def multiply(device: torch.device, size: int, seconds: float = 0.3) -> tuple[float, bool]:
    """TFLOP/s of square products (bf16 on CUDA, fp32 on a CPU) for so many seconds, and whether the last one's result, 1
    everywhere, is right.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ones = torch.ones(size, size, dtype=dtype, device=device)
    product = ones @ (ones / size)  # a power of two: exact
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
