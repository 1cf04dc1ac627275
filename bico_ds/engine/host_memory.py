"""What a CPU run asks of the operating system's memory: freed pages kept for the next step, nothing left in /dev/shm."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# What freed pages may grow to beyond what steps use. A release costs the next step about half a step's time in page
# faults, so there should be tens of steps between two: a 135 M model grew to 17 GB in 50. And all ranks of a machine
# together stay below a quarter of its memory.
MOST_FREED_BYTES = 4 << 30
_SHARE_OF_MEMORY = 1 / 4
_SETTLING_STEPS = 4  # after a release: steps of both objectives, whose pages are to be kept
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


def release_freed_pages() -> None:
    """Return what `keep_freed_pages` has kept, when it has grown too much. To be called after every step.

    Batches of ever other sizes leave holes in the heap, which grows without end. Measured is the resident memory:
    beyond what it was after the first steps since the last release it may grow by `MOST_FREED_BYTES`, or this rank's
    part of a quarter of the machine's memory where that is less. Memory that is in use counts, too, once: the next
    release is measured from there.
    """
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None and _growth().is_too_much(_resident_bytes()):
        malloc_trim(0)


@dataclass(kw_only=True)
class _Growth:
    """How far the resident memory may grow, and its level in the first steps since the last release; bytes."""

    allowed: int
    steps: int = 0
    level: int = 0

    def is_too_much(self, resident: int) -> bool:
        self.steps += 1
        if self.steps <= _SETTLING_STEPS:
            self.level = max(self.level, resident)
        elif resident > self.level + self.allowed:
            self.steps = self.level = 0
            return True
        return False


@functools.cache
def _growth() -> _Growth:
    ranks = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"))
    share = int(_memory_limit() * _SHARE_OF_MEMORY) // int(next(filter(None, ranks), "1"))
    return _Growth(allowed=min(MOST_FREED_BYTES, share))


def _resident_bytes() -> int:
    """Of this process, without the pages of mapped files: those are the system's to take."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _memory_limit() -> int:
    """Bytes of memory: the machine's, or those of the tightest control group around this process."""
    limits = [psutil.virtual_memory().total]
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, and version 1
            root, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
            group = Path("/sys/fs/cgroup", root, path.lstrip("/"))
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    limits.append(int((folder / name).read_text(encoding="ascii")))
    return min(limits)


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
