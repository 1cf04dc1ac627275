"""A rank follows the processes above it, and only those that are its launcher's. Real processes, real kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests import ROOT

RANK = """
import sys, time
from bico_ds.runtime.launcher import follow_launcher
from bico_ds.runtime.signals import StopFlag
stop = StopFlag()
follow_launcher(stop)
print("ready", flush=True)
deadline = time.monotonic() + float(sys.argv[1])
while not stop and time.monotonic() < deadline:
    time.sleep(0.05)
print(stop.reason if stop else "still training", flush=True)
"""
# Starts argv[1:] and waits, as a launcher does and the shell or command above it.
PARENT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.mark.parametrize(
    ("launcher", "seconds", "expected"),
    [
        ("deepspeed.launcher.launch", 30, "the launching command is gone"),
        ("torch.distributed.run", 3, "still training"),
    ],
)
def test_a_rank_stops_without_the_command_above_deepspeeds_launcher_only(launcher, seconds, expected):
    rank = ["-c", RANK, str(seconds)]
    # The marker stands on the launcher's command line alone, where `-m deepspeed.launcher.launch` stands.
    starter = f"'{launcher}'; {PARENT}"
    command = [sys.executable, "-c", PARENT, "-c", starter, *rank]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        shell.kill()
        assert shell.stdout.readline() == f"{expected}\n"


@pytest.mark.parametrize(("hung_up", "expected"), [(True, "SIGHUP\n"), (False, "")])
def test_a_rank_outlives_its_launcher_only_where_their_terminal_closed(hung_up, expected):
    """Its launcher dies at once; a rank that was told why has to save."""
    own = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    rank = RANK.replace("follow_launcher(stop)", "stop.install([]); follow_launcher(stop)")
    # As a backward pass would, in which no handler runs, and a save.
    work = "import hashlib\nhashlib.pbkdf2_hmac('sha256', b'', b'', 4_000_000)"
    rank = rank.replace("\nprint(stop", "\ntime.sleep(1)\nprint(stop").replace("\nwhile", f"\n{work}\nwhile")
    command = [sys.executable, "-c", PARENT, "-c", rank, "30"]
    try:
        launcher = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGHUP, own)
    with launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        if hung_up:
            os.killpg(launcher.pid, signal.SIGHUP)
        else:
            launcher.kill()
        assert launcher.stdout.readline() == expected


def test_a_rank_without_a_visible_parent_follows_nobody(monkeypatch):
    from bico_ds.runtime import launcher
    from bico_ds.runtime.signals import StopFlag

    monkeypatch.setattr(launcher.os, "getppid", lambda: 0)
    launcher.follow_launcher(StopFlag())


@pytest.mark.parametrize(("rank", "lines"), [("0", True), ("1", False)])
def test_the_recipes_are_listed_by_one_rank(monkeypatch, rank, lines):
    monkeypatch.setenv("RANK", rank)
    command = [sys.executable, "launch/train.py", "--list-recipes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("tiny_bico" in done.stdout) is lines
