"""A rank that stands still leaves its stacks and ends; a rank that fails takes the others with it. Real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bico_ds.runtime.launch_environment import free_port
from bico_ds.runtime.run_folder import RunFolder, read_state

RANK = """
import sys, time
from datetime import timedelta
import torch
from torch.distributed import TCPStore
from bico_ds.common.errors import UserError
from bico_ds.runtime import watchdog
from bico_ds.runtime.distributed import Ranks
from bico_ds.common.process_end import end_process
from bico_ds.runtime.run_folder import RunFolder
folder, run_id, port, size, rank, minutes, poll, what = sys.argv[1:]
watchdog.POLL_SECONDS, watchdog.GRACE_SECONDS = float(poll), 3.0
folder = RunFolder(folder)
folder.lock.run_id = run_id
store = TCPStore("127.0.0.1", int(port), int(size), is_master=rank == "0", timeout=timedelta(seconds=60))
ranks = Ranks(int(rank), int(rank), int(size), torch.device("cpu"))
dog = watchdog.Watchdog(store, ranks, folder, minutes=float(minutes))
dog.note_progress()

def waiting_in_a_collective():
    time.sleep(60)

if what == "raise":
    time.sleep(1)
    dog.report(UserError("no such file"))
    time.sleep(1)
    end_process(2)  # as launch/train.py does
waiting_in_a_collective()
"""


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    return folder


def run_ranks(folder: RunFolder, each: list[tuple[float, float, str]]) -> list[tuple[int, str]]:
    """Each rank by its minutes, its seconds between two looks, and what it does; how each ended and what it printed."""
    port, size = str(free_port()), str(len(each))
    begin = [sys.executable, "-c", RANK, str(folder.path), folder.lock.run_id, port, size]
    ranks = [
        subprocess.Popen([*begin, str(rank), *map(str, arguments)], stderr=subprocess.PIPE, text=True)
        for rank, arguments in enumerate(each)
    ]
    return [(rank.wait(timeout=120), rank.stderr.read()) for rank in ranks]  # type: ignore[union-attr]


def test_ranks_that_stand_still_leave_their_stacks_and_end(folder):
    ended = run_ranks(folder, [(0.03, 0.1, "wait"), (0.03, 0.1, "wait")])
    assert [code for code, _ in ended] == [1, 1]
    for rank in (0, 1):
        assert "waiting_in_a_collective" in (folder.logs / f"stacks-rank-{rank}.txt").read_text()
    assert "no progress for 1.8 seconds (distributed.watchdog_minutes)" in ended[0][1]
    assert read_state(folder.state_file)["state"] == "failed"
    folder.close()


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_looks_late_still_learns_of_a_stall_and_leaves_its_stacks(folder, first):
    """Rank 0 holds the store in which the others read of it."""
    minutes = [60.0, 60.0, 60.0]
    minutes[first] = 0.03
    ended = run_ranks(folder, list(zip(minutes, (0.1, 0.1, 0.5), ["wait"] * 3, strict=True)))
    assert [code for code, _ in ended] == [1, 1, 1]
    for rank in range(3):
        assert "waiting_in_a_collective" in (folder.logs / f"stacks-rank-{rank}.txt").read_text()
    folder.close()


def test_the_error_of_any_rank_is_told_by_the_first_and_ends_all(folder):
    ended = run_ranks(folder, [(60, 0.1, "wait"), (60, 0.1, "raise")])
    assert [code for code, _ in ended] == [2, 2]
    assert ended[0][1] == "error: rank 1: no such file\n"
    folder.close()
