"""`bico-ds sweep` with real ranks: one run that fails beside another, and a sweep that is ended and goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.distributed.launching import environment, metrics, train
from tests.distributed.survival import RECIPE, SMALL, assert_same_course, state
from tests.waiting import waited

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]
QUIET = ("evaluation.every_steps=null", "evaluation.tasks=[]")


def sweep_words(folder: Path, *overrides: str) -> list[str]:
    words = [
        sys.executable,
        str(ROOT / "tools" / "sweep.py"),
        "--recipe",
        RECIPE,
        "--output-dir",
        str(folder),
    ]
    overrides = (*SMALL, *QUIET, f"data.cache_dir={folder.parent / 'data'}", *overrides)
    return [*words, *(word for override in overrides for word in ("--set", override)), "--jobs", "2"]


def test_two_runs_train_side_by_side_and_the_one_that_fails_is_listed(tmp_path):
    good, bad = (tmp_path / "s" / f"{RECIPE}+lr={lr}" for lr in ("0.001", "0.002"))
    bad.mkdir(parents=True)
    (bad / "checkpoints").write_text("in the way of a folder")
    words = sweep_words(tmp_path / "s", "training.steps=4", "schedule={name: constant}")
    done = subprocess.run(
        [*words, "--grid", "optimizer.lr=1e-3,2e-3"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert state(good)["state"] == "done" and [line["step"] for line in metrics(good)] == [1, 2, 3, 4]
    assert (bad / "checkpoints").read_text() == "in the way of a folder"
    assert "1 failed; the same command tries again" in done.stderr
    assert f"  {bad.name}: error: " in done.stderr and f"    {bad}/logs/launch-1.log" in done.stderr
    *_, counts, last = done.stdout.splitlines()
    assert counts.startswith("1 of 2 runs are done; ")
    assert last.startswith("compare them: ") and last.endswith(f" {tmp_path}/s")


@pytest.mark.slow  # some two minutes: make test-slow
@pytest.mark.timeout(1200)
def test_a_sweep_that_is_ended_goes_on_to_the_runs_that_it_would_have_been(tmp_path):
    """SIGTERM, as a batch system sends it, reaches the sweep alone: it sees to it that the ranks save."""
    steps = ("training.steps=150", "checkpoint.every_steps=50", "checkpoint.keep_last=1")
    words = [*sweep_words(tmp_path / "s", *steps), "--grid", "seed=1,2"]
    runs = [tmp_path / "s" / f"{RECIPE}+seed={seed}" for seed in (1, 2)]
    first = subprocess.Popen(words, cwd=tmp_path, env=environment(), start_new_session=True)

    def both_train() -> bool:
        files = [run / "metrics.jsonl" for run in runs]
        return all(file.exists() and file.read_text().count("\n") >= 5 for file in files)

    waited(both_train, 200)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=120) == 130
    assert {state(run)["state"] for run in runs} <= {"preempted", "done"}
    assert "preempted" in {state(run)["state"] for run in runs}
    again = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    straight = tmp_path / "straight"
    done = train(RECIPE, straight, *SMALL, *QUIET, *steps, "seed=2", ranks=1)
    assert done.returncode == 0, done.stdout
    assert_same_course(runs[1], straight, step=150)
