"""What happens to a run folder while its run is on: a real run, started as a user starts it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.distributed.launching import end_tree, environment, last_step, launch_command, wait_until
from tests.distributed.survival import RECIPE, SMALL, state

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def test_a_run_outlives_its_metrics_and_its_log_and_says_where_its_folder_went(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    arguments = ["--recipe", RECIPE, "--output-dir", str(run)]
    for override in (*SMALL, "training.steps=100000", "checkpoint.every_steps=null", "monitor.csv=true"):
        arguments += ["--set", override]
    with open("/dev/full" if Path("/dev/full").exists() else "/dev/null", "w") as log:
        command = subprocess.Popen(
            launch_command(*arguments, ranks=1),
            cwd=tmp_path, env=environment(), stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: last_step(run) >= 3, command, timeout=300)
        for name in ("tensorboard", "csv", "metrics.jsonl"):  # at once: the run writes there all the time
            (run / name).rename(tmp_path / name)
        (run / "lock.json").unlink()
        wait_until(lambda: last_step(run) >= 6, command)
        wait_until((run / "lock.json").exists, command)
        wait_until(lambda: list(run.glob("tensorboard/*")), command)
        wait_until(lambda: list(run.glob("csv/*/Train_Samples_lr.csv")), command)  # the engine's own numbers
        run.rename(elsewhere)
        assert command.wait(timeout=120) == 1
    finally:
        end_tree(command)
    assert state(elsewhere)["state"] == "failed"
    assert f"renamed to '{elsewhere}'" in state(elsewhere)["reason"]
    assert not run.exists()
    assert not list(elsewhere.rglob(".*"))
