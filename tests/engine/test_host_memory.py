"""Memory of the host: freed pages stay, shared buffers do not."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path("/dev/shm")
FAULTS = """
import resource, torch
from bico_ds.engine.host_memory import keep_freed_pages
torch.set_num_threads(1)
if {keep}: assert keep_freed_pages()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16 << 20).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(5)))
"""


def faults(*, keep: bool) -> int:
    program = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)


def test_a_tensor_of_the_size_of_a_freed_one_takes_its_pages():
    pages = (64 << 20) // resource.getpagesize()
    assert faults(keep=False) > pages // 600  # mapped anew each time, in pages of at most 2 MB
    assert faults(keep=True) < 20


RELEASE = """
from pathlib import Path
import torch
from bico_ds.engine.host_memory import keep_freed_pages, release_freed_pages
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
assert keep_freed_pages()
held = [torch.ones(1 << 20) for _ in range(200)]  # 4 MB each
del held[::2]  # holes
before = resident()
release_freed_pages(49)
assert resident() > before - 8, "only at every 50th step"
release_freed_pages(50)
print(before - resident())
"""


def test_holes_between_tensors_that_stay_go_back_to_the_system():
    program = [sys.executable, "-c", RELEASE]
    assert int(subprocess.run(program, capture_output=True, text=True, check=True).stdout) > 350  # MB


@pytest.mark.skipif(not SHARED.is_dir(), reason="this system has no /dev/shm")
def test_only_the_own_rank_s_buffer_of_this_job_is_unlinked(monkeypatch):
    from bico_ds.engine.host_memory import unlink_shared_buffer

    port = f"test{os.getpid()}"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    buffers = [
        SHARED / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_{rank}" for rank in (0, 1)
    ]
    for buffer in buffers:
        buffer.touch()
    try:
        unlink_shared_buffer(1)
        unlink_shared_buffer(1)
        assert [buffer.exists() for buffer in buffers] == [True, False]
    finally:
        buffers[0].unlink()
