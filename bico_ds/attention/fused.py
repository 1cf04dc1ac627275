"""The fused CPU kernel (native/tiles.cpp): built at first use, loaded once, and silent about nothing.

It needs a C++ compiler, AVX-512 and bf16 or fp32 inputs; AMX makes the products of bf16 fast. The library lies in
``$XDG_CACHE_HOME/bico_ds`` (``~/.cache/bico_ds``) under a name made of everything it depends on, and is
moved there in one step, so that processes that build at the same time do not disturb each other.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bico_ds.attention.dense import DenseInputs
from bico_ds.attention.tiles import TileRows

logger = logging.getLogger(__name__)

FUSED_DTYPES = (torch.bfloat16, torch.float32)

_SOURCE = Path(__file__).parent / "native" / "tiles.cpp"
_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-w"),
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-fno-math-errno", "-fno-trapping-math", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
)


@dataclass(frozen=True, kw_only=True)
class FusedRows:
    """`TileRows` as the kernel reads them: ``rows``, ``split`` int64 [Q], ``offsets`` [D+1] into them, and
    ``key_starts``, ``key_counts`` [D], for the documents that have query rows here."""

    rows: Tensor
    split: Tensor
    offsets: Tensor
    key_starts: Tensor
    key_counts: Tensor

    @staticmethod
    def of(rows: TileRows) -> FusedRows:
        present = rows.counts > 0
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows.counts[present])])
        columns = (rows.rows, rows.split, offsets, rows.key_starts[present], rows.key_counts[present])
        tensors = [torch.from_numpy(np.ascontiguousarray(column)) for column in columns]
        return FusedRows(
            rows=tensors[0],
            split=tensors[1],
            offsets=tensors[2],
            key_starts=tensors[3],
            key_counts=tensors[4],
        )

    def arguments(self) -> tuple[Tensor, ...]:
        return self.rows, self.split, self.offsets, self.key_starts, self.key_counts


def fused_forward(rows: FusedRows, inputs: DenseInputs, out: Tensor, lse: Tensor) -> None:
    """As `dense_forward`, for all tiles at once."""
    torch.ops.bico_ds.tiles_forward(
        *_contiguous(inputs), *rows.arguments(), inputs.scale, inputs.causal, out, lse
    )


def fused_backward(
    rows: FusedRows,
    inputs: DenseInputs,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """As `dense_backward`, for all tiles at once."""
    torch.ops.bico_ds.tiles_backward(
        grad_out.contiguous(),
        *_contiguous(inputs),
        out,
        lse,
        *rows.arguments(),
        inputs.scale,
        inputs.causal,
        dq,
        dk,
        dv,
    )


def _contiguous(inputs: DenseInputs) -> list[Tensor]:
    return [x.contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin)]


@functools.cache
def fused_refusal() -> str | None:
    """Why the fused kernel cannot run on this machine; None once it is built and loaded."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return f"needs a CPU with AVX-512, torch reports {capability}"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "needs a C++ compiler (g++ or clang++, or $CXX), none was found"
    try:
        torch.ops.load_library(_built(compiler))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        lines = detail.strip().splitlines() or [str(error)]
        return f"could not be built or loaded with {compiler}: {lines[0][:200]}"
    return None


def _built(compiler: str) -> str:
    """Path of the library, compiled if it is not in the cache."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = repr((_SOURCE.read_bytes(), _FLAGS, version, torch.__version__, torch.__file__))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bico_ds"
    library = cache / f"attention_tiles_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return str(library)
    cache.mkdir(parents=True, exist_ok=True)
    logger.info("building the fused CPU attention kernel once (about half a minute) into %s", library)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        target = Path(folder) / library.name
        subprocess.run([compiler, *_command_line(target)], capture_output=True, text=True, check=True)
        target.replace(library)
    logger.info("built in %.0f s", time.monotonic() - started)
    return str(library)


def _command_line(target: Path) -> list[str]:
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    return [*_FLAGS, abi, *includes, str(_SOURCE), "-o", str(target), *libraries]
