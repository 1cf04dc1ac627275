"""The end of a process: all that was asked for happens, and a native thread that needs Python afterwards ends nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A thread of gloo's on rank 1 calls back into Python when rank 0 joins in: not before rank 1's interpreter is being taken
# down, which the object in sys.modules tells by a file, and then holds up.
_RANKS = """
import os, sys, time
import torch, torch.distributed as dist
from bico_ds.common.process_end import end_process

class Last:
    def __init__(self, path):
        self.path = path
    def __del__(self, mkdir=os.mkdir, sleep=time.sleep):
        mkdir(self.path)
        sleep(3)

rank, folder, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
ending = os.path.join(folder, "ending")
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
held = dist.group.WORLD  # as DeepSpeed does: without it, destroy_process_group waits for gloo's threads
dist.barrier()
if rank == 0:
    while not os.path.exists(ending):
        time.sleep(0.05)
    dist.all_reduce(torch.ones(2))
else:
    sys.modules["last"] = Last(ending)
    dist.all_reduce(torch.ones(2), async_op=True).get_future().then(lambda future: None)
dist.destroy_process_group()
if way == "end_process":
    end_process(0)
"""

_HANDLERS = """
import atexit, sys, threading, time
from bico_ds.common.process_end import end_process

atexit.register(print, "handler", flush=False)
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print("main", end=" ")
end_process(7)
"""


def _exit_code_of_rank_1(folder: Path, way: str) -> int:
    first, second = (
        subprocess.Popen([sys.executable, "-c", _RANKS, str(rank), str(folder), way]) for rank in range(2)
    )
    try:
        return second.wait(timeout=120)
    finally:
        first.kill()
        first.wait()


@pytest.mark.distributed
def test_a_thread_of_gloo_that_still_needs_python_does_not_abort_a_finished_rank(tmp_path):
    assert _exit_code_of_rank_1(tmp_path, "end_process") == 0


@pytest.mark.distributed
def test_the_interpreters_own_end_is_aborted_by_such_a_thread(tmp_path):
    """When this fails, Python or torch has repaired what `end_process` is for."""
    assert _exit_code_of_rank_1(tmp_path, "as usual") == -signal.SIGABRT


def end_with_output(redirections: str, code: int) -> tuple[int, str]:
    """Exit code and stderr of a process that prints a line and ends with `code`."""
    program = f"from bico_ds.common.process_end import end_process; print(1); end_process({code})"
    command = ["bash", "-c", f'{sys.executable} -c "{program}" {redirections}']
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stderr


def test_output_that_cannot_be_written_is_a_failure_with_a_message():
    assert end_with_output(">/dev/full", 0) == (
        1,
        "error: cannot write the output: No space left on device\n",
    )
    assert end_with_output(">/dev/full", 77)[0] == 77
    assert end_with_output(">/dev/full 2>&1", 0)[0] == 1


def test_a_closed_stdout_is_none():
    assert end_with_output(">&-", 0) == (0, "")


def test_threads_handlers_and_output_come_before_the_end():
    ended = subprocess.run([sys.executable, "-c", _HANDLERS], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (7, ["main", "thread", "handler"], "")
