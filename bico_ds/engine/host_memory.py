"""What a CPU run asks of the operating system's memory: freed pages kept for the next step, nothing left in /dev/shm."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_SHARED_BUFFERS = Path("/dev/shm")


def keep_freed_pages() -> bool:
    """Let glibc's malloc serve large tensors from pages that were freed, where it would map new ones each time.

    Training frees and allocates the same sizes at every step, and a fresh page costs more to fault in than to compute on
    (docs/attention.md, "The whole training step"). Returns whether there is a glibc to tell.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def unlink_shared_buffer(rank: int) -> None:
    """Remove the name of this rank's all-reduce buffer, which DeepSpeed 0.19's CPU operation leaves in /dev/shm for ever.

    It is 66 MiB a rank and start, of memory. To be called when all ranks have opened it: what is mapped stays.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    with contextlib.suppress(OSError):
        (_SHARED_BUFFERS / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink()
