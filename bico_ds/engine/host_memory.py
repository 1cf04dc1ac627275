"""What a CPU run asks of the operating system's memory: freed pages kept for the next step, nothing left in /dev/shm."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_RELEASE_EVERY = 50  # steps: a release costs the next step about half a step's time in page faults
_SHARED_BUFFERS = Path("/dev/shm")


def bound_primitive_cache() -> None:
    """Keep 64 of oneDNN's compiled matrix products instead of 1024. To be called before the first product.

    Packed batches differ in their number of rows, so each step compiles its own, and a thousand take gigabytes.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def keep_freed_pages() -> bool:
    """Let glibc's malloc serve large tensors from pages that were freed, where it would map new ones each time.

    Training frees and allocates at every step, and a fresh page costs more to fault in than to compute on
    (docs/attention.md, "The whole training step"). Returns whether there is a glibc to tell.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def release_freed_pages(step: int) -> None:
    """Now and then, return what `keep_freed_pages` has kept: batches of ever other sizes leave holes, and without this a
    135 M model grew to 10 GB in 500 steps.
    """
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None and step % _RELEASE_EVERY == 0:
        malloc_trim(0)


def unlink_shared_buffer(rank: int) -> None:
    """Remove the name of this rank's all-reduce buffer, which DeepSpeed 0.19's CPU operation leaves in /dev/shm for ever.

    It is 66 MiB a rank and start, of memory. To be called when all ranks have opened it: what is mapped stays.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    with contextlib.suppress(OSError):
        (_SHARED_BUFFERS / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink()


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None
