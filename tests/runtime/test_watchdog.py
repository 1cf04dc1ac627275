"""A rank that stands still leaves its stacks and ends; a rank that fails takes the others with it. Real processes."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bico_ds.runtime import watchdog
from bico_ds.runtime.launch_environment import free_port
from bico_ds.runtime.nodes.failed_node import node_name
from bico_ds.runtime.run_folder import RunFolder, read_state

RANK = """
import os, signal, sys, time
from datetime import timedelta
import torch
from torch.distributed import TCPStore
from bico_ds.common.errors import UserError
from bico_ds.runtime import watchdog
from bico_ds.runtime.distributed import Ranks
from bico_ds.common.process_end import end_process
from bico_ds.runtime.run_folder import RunFolder
folder, run_id, port, size, rank, minutes, poll, what = sys.argv[1:9]
watchdog.POLL_SECONDS, watchdog.GRACE_SECONDS = float(poll), 3.0
folder = RunFolder(folder)
folder.lock.run_id = run_id
store = TCPStore("127.0.0.1", int(port), int(size), is_master=rank == "0", timeout=timedelta(seconds=60))
ranks = Ranks(int(rank), int(rank), int(size), torch.device("cpu"))
dog = watchdog.Watchdog(store, ranks, folder, minutes=float(minutes))
store.set(f"watched/{rank}", "")
store.wait([f"watched/{other}" for other in range(int(size))])

def waiting_in_a_collective():
    time.sleep(60)

if what in ("joins", "does not join"):
    import torch.distributed as dist
    from bico_ds.runtime.distributed import begin_group
    begin_group(ranks.device, store=store, rank=ranks.rank, world_size=ranks.world_size)
    dist.all_reduce(torch.ones(3))
dog.note_progress()  # not before: a group takes seconds on a busy machine
if what == "joins":
    dist.all_reduce(torch.ones(5))

if what == "stranger":  # whoever reaches the store
    time.sleep(1)
    store.set("bico_ds/failure", '{"rank": 1, "text": "done", "code": 0, "stalled": false, "is_certain": true}')
if what == "collective":
    import torch.distributed as dist
    from bico_ds.runtime.distributed import begin_group
    begin_group(ranks.device, store=store, rank=ranks.rank, world_size=ranks.world_size)
    try:
        while True:
            dist.barrier()
            if rank == sys.argv[9]:
                os.kill(os.getpid(), signal.SIGKILL)
    except RuntimeError as error:
        cause = dog.report(error)
        if rank == "0":
            print(f"raised: {type(cause).__name__}: {cause}", file=sys.stderr, flush=True)
        end_process(1)
if what == "killed":
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "raise":
    time.sleep(1)
    dog.report(UserError("no such file"))
    time.sleep(1)
    end_process(2)  # as launch/train.py does
waiting_in_a_collective()
"""

# Each trial is a fork, since the imports take seconds. The interpreter's own end is the worst that can come after a report;
# a watchdog that looks without a pause is in the store at that moment.
ENDS = """
import os, sys, time
from datetime import timedelta
import torch
from torch.distributed import TCPStore
from bico_ds.common.command_line import Command
from bico_ds.common.errors import UserError
from bico_ds.runtime import watchdog
from bico_ds.runtime.distributed import Ranks
from bico_ds.runtime.run_folder import RunFolder

watchdog.POLL_SECONDS = 0.0

def watched():
    store = TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=60))
    dog = watchdog.Watchdog(store, Ranks(0, 0, 1, torch.device("cpu")), RunFolder(sys.argv[1]), minutes=60)
    time.sleep(0.1)
    return dog

def reports_and_raises(options):
    error = UserError("no such file")
    watched().report(error)
    raise error

def raises_unexpectedly(options):
    dog = watched()
    raise ZeroDivisionError

def ends_in_the_interpreter():
    try:
        reports_and_raises(None)
    except UserError:
        sys.exit(2)

def command(run):
    return Command(description=None, add_options=lambda parser: None, run=run)

for end in (
    ends_in_the_interpreter,
    lambda: command(reports_and_raises).start([]),
    lambda: command(raises_unexpectedly).start([]),
):
    codes = []
    for trial in range(6):
        child = os.fork()
        if child == 0:
            end()
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(*codes, file=sys.stderr)
"""


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    return folder


def run_ranks(folder: RunFolder, each: list[tuple[float, float, str]], *more: str) -> list[tuple[int, str]]:
    """Each rank by its minutes, its seconds between two looks, and what it does; how each ended and what it printed."""
    port, size = str(free_port()), str(len(each))
    begin = [sys.executable, "-c", RANK, str(folder.path), folder.lock.run_id, port, size]
    ranks = [
        subprocess.Popen([*begin, str(rank), *map(str, arguments), *more], stderr=subprocess.PIPE, text=True)
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


def test_of_a_stall_the_record_of_every_rank_tells_who_joined_which_collective(folder):
    """In the format of torch's flight recorder. The rank that does not join learns of the stall, and writes its own."""
    ended = run_ranks(folder, [(0.05, 0.1, "joins"), (60, 0.1, "does not join")])
    assert [code for code, _ in ended] == [1, 1]
    sizes = []
    for rank in (0, 1):
        with open(folder.logs / "flight_recorder" / f"rank-{rank}", "rb") as file:
            entries = pickle.load(file)["entries"]
        sizes.append([entry["input_sizes"] for entry in entries if "all_reduce" in entry["profiling_name"]])
    assert sizes == [[[[3]], [[5]]], [[[3]]]]
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


def test_a_stranger_in_the_store_cannot_end_a_run_as_if_it_were_done(folder):
    ended = run_ranks(folder, [(60, 0.1, "wait"), (60, 0.1, "stranger")])
    assert ended[0][0] == 1
    assert ended[0][1].startswith("error: the ranks' store holds what no rank has written")
    assert read_state(folder.state_file)["state"] == "failed"
    folder.close()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_others_that_wait(folder, killed):
    """No collective fails: its neighbours see that its process is gone."""
    each = [(60, 0.1, "killed" if rank == killed else "wait") for rank in range(2)]
    ended = run_ranks(folder, each)
    assert [code for code, _ in ended] == [-9 if rank == killed else 1 for rank in range(2)]
    # torch's store writes a warning of its own where rank 0 is gone.
    assert ended[1 - killed][1].endswith(f"error: rank {killed}: the process is gone\n")
    told = read_state(folder.state_file)
    assert told["reason"] == f"rank {killed}: the process is gone"
    assert (told["failed_rank"], told["failed_host"]) == (killed, node_name()), "rank 0's, too"
    folder.close()


def test_a_killed_rank_is_named_also_where_the_collective_notices_first(folder):
    ended = run_ranks(folder, [(60, 0.5, "collective")] * 3, "2")
    assert [code for code, _ in ended] == [1, 1, -9]
    assert "raised: RunError: rank 2: the process is gone\n" in ended[0][1]
    folder.close()


def test_a_watchdog_in_the_store_at_the_very_end_aborts_no_failing_rank(tmp_path):
    """It did: SIGABRT instead of the exit code, with "terminate called" or "Fatal Python error" on stderr."""
    command = [sys.executable, "-c", ENDS, str(tmp_path)]
    messages = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=200).stderr
    codes = [line.split() for line in messages.splitlines() if re.fullmatch(r"(-?\d+ ?)+", line)]
    assert codes == [["2"] * 6, ["2"] * 6, ["1"] * 6], messages
    assert "terminate called" not in messages and "Fatal Python error" not in messages


def test_stacks_that_have_no_room_on_disk_go_to_stderr(tmp_path, capfd):
    watchdog.write_stacks(tmp_path / "stacks.txt")
    assert "test_stacks_that_have_no_room" in (tmp_path / "stacks.txt").read_text()
    assert capfd.readouterr().err == ""
    for path in (Path("/dev/full"), tmp_path / "no folder" / "stacks.txt"):
        watchdog.write_stacks(path)
        assert "test_stacks_that_have_no_room" in capfd.readouterr().err
