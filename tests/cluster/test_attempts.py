"""Whether a batch script goes on, requeues or gives up depends on the state file and the checkpoints, not on exit codes."""

from __future__ import annotations

import json

import pytest

from bico_ds.cluster.attempts import TRY_AGAIN, begin, end


def write_state(run, state, run_id, reason=""):
    (run / "state.json").write_text(
        json.dumps({"state": state, "step": 7, "reason": reason, "run_id": run_id})
    )


def write_checkpoint(run, step, *, complete=True):
    path = run / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    if complete:
        (path / "manifest.json").write_text("{}")


def start(run, restarts=0):
    return begin(run, job="1", restarts=restarts, limit=3)


def finish(run, code, restarts=0, *, stopped=False):
    return end(run, srun_code=code, stopped=stopped, restarts=restarts, limit=3)


def test_an_end_of_which_no_start_is_recorded_is_a_failure_with_a_reason(tmp_path):
    verdict = finish(tmp_path, 0)
    assert verdict.exit_code == 1
    assert "no start is recorded" in verdict.why


@pytest.mark.parametrize("code", [0, 1, 143])
def test_done_is_success_whatever_srun_returned(tmp_path, code):
    start(tmp_path)
    write_state(tmp_path, "done", "a")
    assert finish(tmp_path, code).exit_code == 0


def test_success_of_srun_without_a_state_is_failure(tmp_path):
    start(tmp_path)
    assert finish(tmp_path, 0).exit_code == 1


def test_the_state_of_an_earlier_start_does_not_count(tmp_path):
    write_state(tmp_path, "done", "a")
    write_checkpoint(tmp_path, 5)
    start(tmp_path)
    assert finish(tmp_path, 143).exit_code == 143


@pytest.mark.parametrize("state", ["failed", "running"])
def test_a_crash_is_requeued_only_after_a_new_checkpoint(tmp_path, state):
    write_checkpoint(tmp_path, 5)
    start(tmp_path)
    write_state(tmp_path, state, "a")
    assert finish(tmp_path, 143).exit_code == 143
    write_checkpoint(tmp_path, 10, complete=False)
    assert finish(tmp_path, 143).exit_code == 143, "a checkpoint without a manifest is no progress"
    write_checkpoint(tmp_path, 15)
    assert finish(tmp_path, 143).exit_code == TRY_AGAIN


def test_a_preempted_run_is_requeued_even_without_progress(tmp_path):
    start(tmp_path)
    write_state(tmp_path, "preempted", "a", "SIGUSR1")
    verdict = finish(tmp_path, 0)
    assert verdict.exit_code == TRY_AGAIN
    assert "SIGUSR1" in verdict.why


def test_a_stop_before_training_is_requeued_and_a_failure_there_is_not(tmp_path):
    write_state(tmp_path, "preempted", "a")
    start(tmp_path)
    assert finish(tmp_path, 138, stopped=True).exit_code == TRY_AGAIN
    assert finish(tmp_path, TRY_AGAIN).exit_code == 1


def test_restarts_are_limited_and_the_end_is_no_success(tmp_path):
    start(tmp_path, restarts=3)
    write_state(tmp_path, "preempted", "a")
    assert finish(tmp_path, 0, restarts=3).exit_code not in (0, TRY_AGAIN)
    assert start(tmp_path, restarts=4).exit_code == 1, "SLURM requeues dead nodes without asking"


def test_starts_that_gain_nothing_end_the_job(tmp_path):
    write_checkpoint(tmp_path, 5)
    assert [begin(tmp_path, job="1", restarts=n, limit=20).exit_code for n in range(4)] == [0, 0, 0, 1]
    assert begin(tmp_path, job="2", restarts=0, limit=20).exit_code == 0, (
        "a new submission is a person's decision"
    )


@pytest.mark.parametrize("state", ["preempted", "failed"])
def test_a_run_with_a_stop_file_is_saved_and_not_requeued(tmp_path, state):
    start(tmp_path)
    (tmp_path / "stop").touch()
    write_state(tmp_path, state, "a", "SIGUSR1")
    write_checkpoint(tmp_path, 5)
    assert finish(tmp_path, 0).exit_code not in (0, TRY_AGAIN)


def test_a_finished_run_is_done_in_spite_of_a_stop_file(tmp_path):
    start(tmp_path)
    (tmp_path / "stop").touch()
    write_state(tmp_path, "done", "a")
    assert finish(tmp_path, 0).exit_code == 0


def test_a_stop_file_holds_for_restarts_and_not_for_a_new_submission(tmp_path):
    (tmp_path / "stop").touch()
    assert start(tmp_path, restarts=1).exit_code == 1, "SLURM requeues after a node failure without asking"
    assert (tmp_path / "stop").exists()
    assert start(tmp_path, restarts=0).exit_code == 0
    write_state(tmp_path, "preempted", "a")
    assert finish(tmp_path, 0).exit_code == TRY_AGAIN, "the stop file of an earlier submission is gone"


def test_a_crash_code_is_never_taken_for_a_verdict(tmp_path):
    start(tmp_path)
    write_state(tmp_path, "failed", "a")
    assert finish(tmp_path, TRY_AGAIN).exit_code == 1
