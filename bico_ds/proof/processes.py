"""A program with a time limit, of which nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

_MARK = "BICO_DS_PROOF_PART"
_SECONDS_TO_DIE = 5.0  # of a killed process; one that hangs in a driver may outlive it


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a program ended: its exit code, None where the limit cut it; and after how many seconds."""

    code: int | None
    seconds: float


def run_with_limit(command: list[str], *, log: Path, seconds: float, environment: dict[str, str]) -> Ended:
    """Run a program for at most `seconds`; what it prints goes to `log` as it comes.

    At its end, its limit's, or an exception's (Ctrl-C), every process that it started is killed: its group, and those that
    left the group, by a mark in their environment.
    """
    mark = f"{_MARK}={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    started = time.monotonic()
    process: subprocess.Popen[bytes] | None = None
    code = None
    try:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**environment, name: value}, start_new_session=True,
            )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=seconds)
    finally:
        elapsed = time.monotonic() - started
        if process is not None:
            _end_all(process, name, value)
    return Ended(code=code, seconds=elapsed)


def _end_all(process: subprocess.Popen[bytes], name: str, value: str) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + _SECONDS_TO_DIE
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_SECONDS_TO_DIE)
    while (left := _carrying(name, value)) and time.monotonic() < deadline:
        for other in left:
            with contextlib.suppress(psutil.Error):
                other.kill()
        time.sleep(0.02)


def _carrying(name: str, value: str) -> list[psutil.Process]:
    """The live processes with this variable in the environment that they began with."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == value:
                found.append(process)
    return found
