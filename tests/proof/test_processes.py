"""A program is cut by its limit, and whatever it started goes with it."""

from __future__ import annotations

import os
import sys
import time

import psutil
import pytest

from bico_ds.proof.processes import run_with_limit
from tests.proof.tools_of_a_proof import HANGS, part, pids


def run(tmp_path, source: str, seconds: float = 60):
    tool = part(tmp_path, "tool", source).tool
    log = tmp_path / "log"
    ended = run_with_limit([sys.executable, tool], log=log, seconds=seconds, environment=dict(os.environ))
    return ended, log.read_text()


def alive(numbers: list[int]) -> list[int]:
    """Those that do not end; one that was killed a moment ago may still be on its way out."""
    deadline = time.monotonic() + 20
    while (left := [n for n in numbers if _runs(n)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _runs(number: int) -> bool:
    try:
        return psutil.Process(number).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def test_what_hangs_is_cut_with_all_that_it_started_and_keeps_what_it_had_said(tmp_path):
    for seconds in (2, 8, 32):  # a busy machine may need longer until all is started
        started = time.monotonic()
        ended, output = run(tmp_path, HANGS, seconds=seconds)
        assert ended.code is None and seconds <= ended.seconds <= time.monotonic() - started < 200
        if pids(tmp_path, "tool"):
            break
    assert output == "measured: 42 TFLOP/s\n"
    assert len(pids(tmp_path, "tool")) == 3 and not alive(pids(tmp_path, "tool"))


def test_what_ends_by_itself_leaves_nothing_behind_either(tmp_path):
    ended, _ = run(tmp_path, HANGS.replace("time.sleep(600)\n", "sys.exit(7)\n"))
    assert ended.code == 7
    assert len(pids(tmp_path, "tool")) == 3 and not alive(pids(tmp_path, "tool"))


def test_other_processes_are_left_alone(tmp_path):
    other = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        run(tmp_path, "print(1)")
        assert other.is_running() and other.status() != psutil.STATUS_ZOMBIE
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_exit_code_and_both_outputs_are_kept_in_order(tmp_path, code):
    source = f"import os, sys; os.write(1, b'out\\n'); os.write(2, b'error\\n'); sys.exit({code})"
    ended, output = run(tmp_path, source)
    assert (ended.code, output) == (code, "out\nerror\n")
