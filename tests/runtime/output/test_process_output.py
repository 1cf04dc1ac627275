"""A rank's console has what the user can act on, its log everything; real processes, without torch."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from bico_ds.runtime.output.process_output import ProcessOutput
from tests import ROOT
from tests.full_disk import files_limited_to

PROGRAM = """
import faulthandler, logging, os, signal, sys, threading, warnings
from pathlib import Path
from bico_ds.common.errors import UserError
from bico_ds.common.patient_output import outlive_full_disks
from bico_ds.runtime.output.process_output import ProcessOutput, libraries_apart
from bico_ds.runtime.run_folder import RunFolder

folder = RunFolder(sys.argv[1])
ours, deepspeed, others = (logging.getLogger(name) for name in ("bico_ds.part", "DeepSpeed", "my_objective"))

def speak():
    ours.info("our message")
    deepspeed.info("DeepSpeed's chatter")
    deepspeed.warning("DeepSpeed's warning")
    others.warning("warning of an objective")
    warnings.warn("a Python warning")
    with libraries_apart():
        print("printed by a library")
    os.write(1, b"written to descriptor 1\\n")
    os.write(2, b"written to descriptor 2\\n")
    print("printed by us")

with ProcessOutput(VERBOSITY, rank=RANK) as output:
    output.adopt_libraries()
    outlive_full_disks()
    REST
print("printed behind it")
os.write(1, b"written behind it\\n")
"""
OPENED = "speak(); output.open_log(folder)"
APART = ("DeepSpeed's chatter", "DeepSpeed's warning", "a Python warning", "printed by a library")


def run(
    folder: Path, rest: str, *, verbosity: str = "normal", rank: int = 0
) -> subprocess.CompletedProcess[str]:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    program = PROGRAM.replace("REST", rest).replace("VERBOSITY", repr(verbosity)).replace("RANK", str(rank))
    return subprocess.run(
        [sys.executable, "-c", program, folder], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def log_of(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank-{rank}.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, OPENED)


def test_the_console_gets_what_can_be_acted_on_and_the_log_what_libraries_say_too(started):
    folder, done = started
    console, log = done.stdout + done.stderr, log_of(folder)
    for text in APART:
        assert text not in console and text in log
    assert "written to descriptor 1" not in console and "written to descriptor 1\n" in log
    for text in ("our message", "warning of an objective"):
        assert text in done.stderr and text in log
    assert "written to descriptor 2" in done.stderr
    assert done.stdout == "printed by us\nprinted behind it\nwritten behind it\n"


def test_what_is_written_before_the_log_is_open_comes_behind_the_line_of_the_start(started):
    folder, _ = started
    first = log_of(folder)
    assert first.startswith("──── start ") and "rank 0, process " in first.splitlines()[0]
    run(folder, "output.open_log(folder); output.open_log(folder); speak()")
    assert log_of(folder).startswith(first)
    assert log_of(folder).count("──── start ") == 2
    assert log_of(folder).count("written to descriptor 1\n") == 2


def test_a_start_that_never_opens_its_log_leaves_the_folder_as_it_was(tmp_path):
    assert "printed by us" in run(tmp_path, "speak()").stdout
    assert list((tmp_path / "logs").iterdir()) == []


def test_verbose_shows_libraries_and_quiet_no_more_than_warnings(tmp_path):
    verbose = run(tmp_path, OPENED, verbosity="verbose")
    shown = verbose.stdout + verbose.stderr
    assert all(text in shown for text in (*APART, "our message", "written to descriptor 1"))
    quiet = run(tmp_path, OPENED, verbosity="quiet").stderr
    assert "our message" not in quiet and "warning of an objective" in quiet


def test_another_rank_shows_warnings_and_tracebacks_alone_and_logs_all(tmp_path):
    fails = "threading.Thread(target=lambda: [][1], name='worker').start(); 1 / 0"
    done = run(tmp_path, f"{OPENED}; {fails}", rank=3)
    assert "our message" not in done.stderr and "our message" in log_of(tmp_path, rank=3)
    for place in (done.stderr, log_of(tmp_path, rank=3)):
        assert place.count("Traceback") == 2 and "worker" in place
        assert "ZeroDivisionError: division by zero" in place and "IndexError: list index" in place


def test_on_a_terminal_a_logged_line_ends_between_words(monkeypatch):
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 60))
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with ProcessOutput("verbose"):
            logging.getLogger("bico_ds.part").info("%s", "123456789 " * 9)
    # A line and its end may come in two parts; behind all that was written, a closed terminal answers with EIO.
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(main, 1000):
            shown += part
    os.close(main)
    lines = shown.decode().split("\r\n")
    assert lines == [" ".join(["123456789"] * count) for count in (6, 3)] + [""]


def test_a_mistake_of_the_users_is_logged_without_a_traceback(tmp_path):
    run(tmp_path, "output.open_log(folder); raise UserError('model.path: API_KEY=0123456789abcdef')")
    assert "model.path: API_KEY=" in log_of(tmp_path)
    assert "Traceback" not in log_of(tmp_path) and "0123456789abcdef" not in log_of(tmp_path)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_what_a_process_said_before_it_was_killed_is_kept(tmp_path, name):
    done = run(tmp_path, f"output.open_log(folder); speak(); os.kill(os.getpid(), signal.{name})")
    assert done.returncode < 0 and "printed by us" in done.stdout
    assert "written to descriptor 1" in log_of(tmp_path) and "our message" in log_of(tmp_path)
    # Nothing can tell of a kill; of the others there is the stack.
    assert ("in <module>" in log_of(tmp_path)) == (name != "SIGKILL")


def test_logs_that_are_removed_come_again_and_a_renamed_folder_does_not(tmp_path):
    remove = "import shutil; output.open_log(folder); shutil.rmtree(folder.logs); ours.info('again')"
    run(tmp_path / "run", remove)
    assert "again" in log_of(tmp_path / "run")
    rename = "output.open_log(folder); folder.path.rename(folder.path.parent / 'other'); ours.info('lost')"
    assert run(tmp_path / "run", rename).returncode == 0
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_nothing(tmp_path):
    with files_limited_to(200):
        done = run(tmp_path, f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {OPENED}; speak()")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("printed by us") == 2
