"""What every room with Triton kernels needs: whether Triton can run here, and one launch of a kernel."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel with its arguments by name. `warps`, `stages` (loads in flight) None: Triton's own number."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int | None = None
    stages: int | None = None

    @property
    def options(self) -> dict[str, int]:
        given = {"num_warps": self.warps, "num_stages": self.stages}
        return {name: number for name, number in given.items() if number is not None}

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)


def triton_missing(device: torch.device) -> str | None:
    """Why Triton cannot run kernels on this device, in one clause; None where it can. The meta device needs no Triton.

    A CPU can where Triton's interpreter is on (`TRITON_INTERPRET=1`), which is slow, and has no bf16: for tests.
    """
    if device.type == "meta":
        return None
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed (torch's CUDA builds for Linux bring it)"
    if device.type == "cpu":
        return None if is_interpreting() else "runs on CUDA tensors, not on cpu"
    if device.type == "cuda" and not _has_compiler():
        return "needs a C compiler ($CC, else gcc or clang), and finds none: Triton compiles what launches its kernels"
    return None


def is_interpreting() -> bool:
    """Whether Triton's interpreter is on."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _has_compiler() -> bool:
    """Whether Triton, 3.6 to 3.8, will find one (its `runtime/build.py`); in many images with CUDA there is none."""
    named = os.environ.get("CC")
    return any(map(shutil.which, ("gcc", "clang") if named is None else (named,)))
