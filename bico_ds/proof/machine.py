"""What a proof was made on: GPU, driver, versions, source. Results of another machine or source are not taken over.

`python -m bico_ds.proof.machine` prints what only torch knows: in a process of its own, since the proof itself must not
hold memory of the GPU, nor hang in its driver. No torch here until then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from bico_ds.common.errors import RunError, UserError
from bico_ds.config.resources import CHECKOUT
from bico_ds.runtime.run_folder import provenance

_SECONDS = 120.0  # for the driver to answer
_FURTHER_PACKAGES = ("triton", "flash-attn-3", "flash-attn-4", "liger-kernel", "trl")


def checkout() -> Path:
    """The checkout, which alone has the measuring tools. Raises `UserError` in an installed package."""
    if CHECKOUT is None:
        raise UserError(
            "the measuring tools (tools/bench/) are not part of the installed package: run the proof from a checkout, "
            "as python tools/gpu_proof.py"
        )
    return CHECKOUT


def describe_machine(*, rehearse: bool) -> dict[str, Any]:
    """The machine, as JSON can hold it. Raises `UserError` where there is no CUDA device, but for a rehearsal."""
    seen = {} if rehearse else _ask_torch()
    if not rehearse and "gpu" not in seen:
        raise UserError(
            f"no CUDA device: torch {seen['torch']} sees none; --rehearse runs every part on a CPU, at a tiny size"
        )
    source = provenance()
    versions = dict(source["versions"])
    for package in _FURTHER_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "rehearsal": rehearse,
        "gpu": seen.get("gpu"),
        "memory_gb": seen.get("memory_gb"),
        "compute_capability": seen.get("compute_capability"),
        "driver": None if rehearse else driver_version(),
        "cuda": seen.get("cuda"),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "compiler": _compiler(),
        "nvcc": seen.get("nvcc"),
        "python": source["python"],
        "versions": versions,
        "commit": source["commit"],
        "sources": _fingerprint(checkout()),
    }


def _compiler() -> str | None:
    """The C++ compiler's name; None where there is none, as in many images with CUDA."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    return found and Path(found).name


def _ask_torch() -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bico_ds.proof.machine"],
            cwd=checkout(), capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunError(f"the GPU's driver did not answer within {_SECONDS:.0f} s (see nvidia-smi)") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"torch cannot use the GPU: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _seen_by_torch() -> dict[str, Any]:
    """Torch's version; of the first CUDA device, where there is one, what it is."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    seen: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        seen["gpu"], seen["memory_gb"] = gpu.name, round(gpu.total_memory / 1e9, 1)
        seen["compute_capability"] = f"{gpu.major}.{gpu.minor}"
    seen["nvcc"] = _release([str(Path(CUDA_HOME, "bin", "nvcc")), "--version"]) if CUDA_HOME else None
    return seen


def _release(nvcc: list[str]) -> str | None:
    found = re.search(r"release ([\d.]+)", _output(nvcc))
    return found.group(1) if found else None


def driver_version() -> str | None:
    """As nvidia-smi says it; None where it says nothing."""
    lines = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
    return lines[0].strip() if lines else None


def _output(command: list[str]) -> str:
    """What a program prints; nothing where it is not there, or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _fingerprint(root: Path) -> str:
    """Digest of all that the proof runs: two uncommitted states of one commit differ."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in (root / "bico_ds", root / "tools" / "bench", root / "recipes", root / "ds_configs"):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(json.dumps(_seen_by_torch()))
