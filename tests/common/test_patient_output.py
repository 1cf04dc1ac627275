"""A log on a full disk is no error of the process that writes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bico_ds.common.patient_output import PatientStream
from tests import ROOT
from tests.full_disk import files_limited_to

PROGRAM = """
from bico_ds.common.command_line import Command
from bico_ds.common.patient_output import outlive_full_disks
def run(options):
    outlive_full_disks()
    outlive_full_disks()
    for _ in range(LINES):
        print("a line of a long log", flush=True)
Command(description=None, add_options=lambda parser: None, run=run).start([])
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_process_whose_log_is_on_a_full_disk_ends_as_it_would():
    with open("/dev/full", "w") as full:
        assert (
            subprocess.run(
                [sys.executable, "-c", PROGRAM.replace("LINES", "1000")], cwd=ROOT, stdout=full, stderr=full
            ).returncode
            == 0
        )


def test_a_reader_that_is_gone_is_not_taken_for_a_full_disk():
    more_than_a_pipe_holds = PROGRAM.replace("LINES", "100_000")
    command = f"{sys.executable} -c '{more_than_a_pipe_holds}' | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not read any more" in done.stderr


def test_what_a_full_disk_took_is_counted_once_there_is_room_again(tmp_path):
    path = tmp_path / "log"
    with open(path, "w", buffering=1) as file:
        stream = PatientStream(file)
        print("before", file=stream)
        with files_limited_to(path.stat().st_size):
            for _ in range(3):
                print("x" * 9_000, file=stream, flush=True)
        print("after", file=stream)
    lines = path.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after"
    assert any("characters of output could not be written" in line for line in lines)
