"""Memory of the operating system in a CPU run: freed pages are kept for the next step, nothing is left in /dev/shm."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from bico_ds.runtime import launch_environment

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# What the resident memory may grow by, to begin with. A release costs the next step about half a step's time in page
# faults, so there should be tens of steps between two: a 135 M model grew to 17 GB in 50. Where there are fewer than
# `_FEW_STEPS`, the bound doubles, but all ranks of a machine together stay below a quarter of its memory.
FREED_BYTES = 4 << 30
_FEW_STEPS = 10
_SHARE_OF_MEMORY = 1 / 4
_SHARED_BUFFERS = Path("/dev/shm")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def bound_primitive_cache() -> None:
    """Keep 64 of oneDNN's compiled matrix products instead of 1024. To be called before the first product.

    Packed batches differ in their number of rows, so each step compiles its own, and a thousand take gigabytes.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def keep_freed_pages() -> bool:
    """Let glibc's malloc serve large tensors from pages that were freed, where it would map new ones each time.

    Training frees and allocates at every step, and a fresh page costs more to fault in than to compute on
    (docs/benchmarks/step.md). Growth is measured from the first call on. Returns whether a glibc took the settings.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)):
        return False
    _growth()
    return True


def release_freed_pages() -> None:
    """Return what `keep_freed_pages` has kept, when it has grown too much. To be called after every step.

    Batches of different sizes leave holes in the heap, which grows without end. What counts is the resident memory. Beyond
    its level right after the last release (or at `keep_freed_pages`) it may grow by `FREED_BYTES`; by twice as much each
    time that two releases are fewer than ten steps apart, so that what steps use is not returned at every one; and at most
    by this rank's part of a quarter of the machine's memory.
    """
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None and _growth().is_too_much(anonymous_bytes()):
        malloc_trim(0)
        _growth().released(anonymous_bytes())


@dataclass(kw_only=True)
class _Growth:
    """How far the resident memory may grow beyond its level right after the last release; bytes."""

    level: int
    allowed: int
    most: int
    steps: int = _FEW_STEPS  # since the last release; at first as if it were long ago

    def is_too_much(self, resident: int) -> bool:
        """To be asked after every step."""
        self.steps += 1
        return resident > self.level + self.allowed

    def released(self, resident: int) -> None:
        if self.steps < _FEW_STEPS:
            self.allowed = min(2 * self.allowed, self.most)
        self.level, self.steps = resident, 0


@functools.cache
def _growth() -> _Growth:
    """Of this process. Where no launcher tells the ranks of this machine, all ranks count: a smaller part for each."""
    ranks = launch_environment.ranks_per_node() or launch_environment.world_size()
    most = int(memory_limit() * _SHARE_OF_MEMORY) // ranks
    return _Growth(level=anonymous_bytes(), allowed=min(FREED_BYTES, most), most=most)


def anonymous_bytes() -> int:
    """Resident memory of this process, without the pages of mapped files: those are the system's to take."""
    resident, shared = resident_and_shared()
    return resident - shared


def resident_and_shared() -> tuple[int, int]:
    """Bytes of this process as `top` shows them: of resident memory, and of mapped files' pages in it, as a token store's.

    Every step reads them, while the loader's thread builds batches: each call to the system lets go of Python's lock, and
    may wait 5 ms to have it back. So there are three of them; `Path.read_text` makes more than twice as many.
    """
    descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _, resident, shared, *_ = os.read(descriptor, 256).split()
    finally:
        os.close(descriptor)
    return int(resident) * _PAGE, int(shared) * _PAGE


def memory_limit() -> int:
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


def machine() -> str:
    """A name of the running system that no other machine has, also where host names are alike; Linux's boot id."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def memory_with_swap() -> int:
    """Bytes that the processes of this node can have at most: those of `memory_limit`, and all of the machine's swap."""
    return memory_limit() + psutil.swap_memory().total


def unlink_shared_buffer(rank: int) -> None:
    """Remove the name of this rank's all-reduce buffer, which DeepSpeed 0.19's CPU operation leaves in /dev/shm.

    It takes 66 MiB of memory per rank and start. To be called when all ranks have opened it: what is mapped stays.
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
