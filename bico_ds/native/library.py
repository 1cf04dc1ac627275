"""The library of fused CPU kernels (the sources beside this file): built at first use, and loaded once.

It needs a C++ compiler and AVX-512, and takes bf16 and fp32; AMX makes the products of bf16 fast. It is kept in
`$XDG_CACHE_HOME/bico_ds` (`~/.cache/bico_ds`) under a name made of everything it depends on, and is moved
there in one step, so that processes that build at the same time do not disturb each other. That folder has to be this
user's alone (0700): one of ours is made so, and what it held is built anew; from one of somebody else nothing is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch

from bico_ds.common.files import atomic_file
from bico_ds.common.private_folder import NotPrivateError, open_private_file, open_private_folder

logger = logging.getLogger(__name__)

NATIVE_DTYPES = (torch.bfloat16, torch.float32)

_AN_OPERATION = "tiles_forward"
_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-w"),
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-fno-math-errno", "-fno-trapping-math", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
)


@functools.cache
def native_refusal() -> str | None:
    """Why the fused kernels cannot run on this machine; None once they are built and loaded."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return f"needs a CPU with AVX-512, torch reports {capability}"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "needs a C++ compiler (g++ or clang++, or $CXX), none was found"
    try:
        _load(_built(compiler))
    except NotPrivateError as error:
        return f"are not loaded from a folder that is not ours alone: {error}; name another by XDG_CACHE_HOME"
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        lines = detail.strip().splitlines() or [str(error)]
        return f"could not be built or loaded with {compiler}: {lines[0][:200]}"
    return None


def _load(library: int) -> None:
    """Load what an open file holds, and close it; by its path another one could be loaded meanwhile.

    Once per process: the loader does not know the same library again where another process has built it anew meanwhile,
    and torch aborts where operations are registered twice.
    """
    try:
        if not hasattr(torch.ops.bico_ds, _AN_OPERATION):
            ctypes.CDLL(f"/dev/fd/{library}")
    finally:
        os.close(library)


def _built(compiler: str) -> int:
    """A descriptor of the library, compiled if it is not in the cache. Raises `NotPrivateError` as the folder does."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    contents = [file.read_bytes() for file in (*_SOURCES, *_HEADERS)]
    key = repr((contents, _FLAGS, version, torch.__version__, torch.__file__))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bico_ds"
    library = cache / f"fused_kernels_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not open_private_folder(cache):
        library.unlink(
            missing_ok=True
        )  # before another rank, which finds the folder private, takes it for ours
    elif (found := _opened(library)) is not None:
        return found
    logger.info("building the fused CPU kernels once (about half a minute) into %s", library)
    started = time.monotonic()
    with atomic_file(library) as target:
        subprocess.run([compiler, *_command_line(target)], capture_output=True, text=True, check=True)
        target.chmod(0o700)
    logger.info("built in %.0f s", time.monotonic() - started)
    built = _opened(library)
    if built is None:
        raise NotPrivateError(f"'{library}' was exchanged by another user")
    return built


def _opened(library: Path) -> int | None:
    try:
        return open_private_file(library)
    except FileNotFoundError:
        return None


def _command_line(target: Path) -> list[str]:
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    return [*_FLAGS, abi, *includes, *map(str, _SOURCES), "-o", str(target), *libraries]
