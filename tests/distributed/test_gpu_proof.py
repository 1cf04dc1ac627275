"""The GPU proof, rehearsed on a CPU from end to end: what will run on a GPU has run before, every part of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bico_ds.proof.aims import speed_up
from bico_ds.proof.parts import PARTS
from tests import ROOT
from tests.distributed.launching import environment

pytestmark = pytest.mark.distributed


def rehearse(folder: Path) -> subprocess.CompletedProcess[str]:
    # Away from its checkout, as a user may start it, and without a GPU, as the rehearsal promises.
    command = [
        sys.executable,
        str(ROOT / "tools" / "gpu_proof.py"),
        "--rehearse",
        "--minutes",
        "20",
        "--out",
        "out",
    ]
    hidden = {"PYTHONPATH": os.fspath(ROOT)}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment() | hidden,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("proof")
    done = rehearse(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def findings(folder: Path, name: str) -> dict[str, Any]:
    parts = json.loads((folder / "out" / "report.json").read_text())["parts"]
    (part,) = [part for part in parts if part["part"] == name]
    return part["findings"]


@pytest.mark.timeout(1300)
def test_every_part_is_right_in_a_rehearsal(folder):
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [(part["part"], part["status"]) for part in report["parts"]] == [(name, "right") for name in PARTS]
    assert report["rehearsal"] and report["title"].startswith("REHEARSAL")
    assert {aim["verdict"] for aim in report["aims"]} == {"not measured"}


def test_a_second_call_runs_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*.log")}
    done = rehearse(folder)
    assert done.returncode == 0 and done.stdout.count("done before") == len(PARTS)
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*.log")} == before


def test_the_reference_belongs_to_the_recipe_and_a_resumed_run_is_the_uninterrupted_one(folder):
    """Where this fails after a change that is meant to change losses: python tools/bench/gpu_run.py --write-reference."""
    _, losses = findings(folder, "run")["tables"]
    rows = losses["rows"]
    assert len(rows) == 24
    for _, here, resumed, reference, _ in rows:
        assert here == resumed
        assert here == pytest.approx(reference, abs=2e-3)


def test_the_aims_find_their_figures_among_what_the_tools_write(folder):
    names = [row["name"] for row in findings(folder, "speed")["rows"]]
    assert any(name.startswith("triton beside two passes") for name in names), names
    assert any("beside the authors' dense form" in name and "bidirectional" in name for name in names), names
    steps = findings(folder, "step")["steps"]
    assert {"kind", "length", "ms", "mfu", "backend"} <= set(steps[0])
    assert {step["kind"] for step in steps} == {"ntp", "bico"}
    assert all(speed_up(row) > 0 for row in findings(folder, "speed")["rows"])


def test_the_collectives_of_training_are_all_timed(folder):
    (table,) = findings(folder, "nccl")["tables"]
    assert [name for name, _ in table["rows"]] == ["all-reduce", "all-gather", "reduce-scatter", "barrier"]
