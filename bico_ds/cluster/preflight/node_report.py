"""The report of one rank on its machine, a dict that JSON can hold; `judge` compares the reports of all ranks."""

from __future__ import annotations

import os
import platform
import shutil
import socket
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
from bico_ds.runtime.device_speed import multiply
from bico_ds.runtime.run_folder import RunFolder, provenance


def collect(recipe: Recipe, run: Path, *, rank: int, local_rank: int) -> dict[str, Any]:
    """This rank's report. What is the same for all ranks of a node is in the report of its first rank only."""
    report: dict[str, Any] = {
        "rank": rank,
        "host": socket.gethostname(),
        "device": inspect_device(local_rank),
        "machine": host_memory.machine(),
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
        flops, report["right"] = multiply(device, torch.bfloat16 if kind == "cuda" else torch.float32)
        report["tflops"] = flops / 1e12
    except RuntimeError as error:
        report["error"] = str(error).splitlines()[0]
    return report
