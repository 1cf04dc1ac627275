"""The code and the prologue of a job that waits while somebody works in the checkout."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from tests import ROOT
from tests.cluster.two_nodes.drill import PYTHON

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
SHORT = ("training.steps=10",)
PARTS = ("bico_ds", "recipes", "ds_configs", "launch")


@pytest.fixture
def mine(workspace, tmp_path):
    """A workspace with a checkout of its own, which a drill may break."""
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    path = {"PYTHONPATH": str(tmp_path)}
    return replace(workspace, checkout=tmp_path, environment=workspace.environment | path)


def held(mine, name, *options):
    return mine.submit(name, "--sbatch=--hold", *options, sets=SHORT)


def completed(run):
    assert run.wait_for_end()["JobState"] == "COMPLETED", run.story()
    assert run.state()["state"] == "done"
    return run


def test_a_copy_runs_with_its_prologue_though_the_checkout_is_broken_meanwhile(mine, note):
    lines = mine.folder / "it's lines.sh"
    lines.write_text("set -e\ncd /\nexport NCCL_DRILL='two words'\n")
    python = mine.folder / "telling-python"
    python.write_text(f'#!/bin/sh\necho "drill=$NCCL_DRILL $(hostname)" >&2\nexec {PYTHON} "$@"\n')
    python.chmod(0o755)
    words = ("--copy-code", "--prologue", str(lines), "--python", str(python), "--sbatch=--export=NONE")
    run = held(mine, "copy it's", *words)
    for file in (mine.checkout / "bico_ds").glob("*.py"):
        file.write_text("raise SystemExit('this is the changed checkout')\n")
    mine.cluster.slurm("scontrol", "release", run.job)
    completed(run)
    assert "WARNING: the code" not in run.output and "changed checkout" not in run.story()
    for node in ("n1", "n2"):
        log = (run.path / "logs" / f"train-{run.job}-{node}.log").read_text()
        assert f"drill=two words {node}" in log
    note("held, checkout broken, released: COMPLETED from the copy, prologue's variable on both nodes")


def test_without_a_copy_a_start_says_that_the_code_has_changed(mine, note):
    run = held(mine, "changed")
    file = mine.checkout / "bico_ds" / "batch.py"
    file.write_text(f"{file.read_text()}\n# changed\n")
    mine.cluster.slurm("scontrol", "release", run.job)
    completed(run)
    assert (
        f"WARNING: the code in '{os.path.realpath(mine.checkout)}' is not that of the submission"
        in run.output
    )
    note("held, a line added, released: COMPLETED, and the job's output begins with the warning")
