"""Pre-emption, dead ranks and dead nodes: resumed without a person, and with the result of an undisturbed
run.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.cluster.two_nodes.drill import files_of
from tests.cluster.two_nodes.settings import CREDENTIAL_SECONDS
from tests.cluster.two_nodes.two_nodes import start_time

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def assert_same_result(run, reference):
    record = run.wait_for_end()
    assert (record["JobState"], record["ExitCode"]) == ("COMPLETED", "0:0"), run.story()
    assert run.state()["state"] == "done"
    assert run.losses() == reference.losses()
    assert run.weights() == reference.weights()
    return record


def test_two_nodes_train_as_two_local_ranks_do(workspace, reference, note):
    run = workspace.submit("plain")
    record = assert_same_result(run, reference)
    assert record["Restarts"] == "0"
    assert {p.name for p in (run.path / "logs").glob("train-*")} >= {
        f"train-{run.job}-{n}.log" for n in ("n1", "n2")
    }
    note("COMPLETED; 40 losses and the exported weights equal to the local run's, bit by bit")


def test_the_stop_signal_saves_requeues_and_resumes(workspace, reference, note):
    run = workspace.submit("signalled")
    run.wait_for_step(12)
    # What --signal=B:USR1 does, at this moment.
    workspace.cluster.slurm("scancel", "--signal=USR1", "--batch", run.job)
    run.wait_for(lambda: len(run.attempts()) == 2, "a second start")
    resumed_at = run.attempts()[1]["step"]
    assert resumed_at >= 12, "the step of the signal was saved, not only the last multiple of 5"
    record = assert_same_result(run, reference)
    assert record["Restarts"] == "1"
    note(f"checkpoint at step {resumed_at}, requeued, resumed, COMPLETED; equal to the uninterrupted run")


def test_the_time_limit_warns_before_it_ends_the_job(workspace, note):
    run = workspace.submit(
        "limited", "--sbatch=--time=3", "--signal-seconds", "60", sets=("training.steps=2000",)
    )
    run.wait_for(lambda: len(run.attempts()) == 2, "a second start")
    assert run.attempts()[1]["step"] > 0
    assert "USR1: the ranks save a checkpoint and stop" in run.output
    assert "preempted (SIGUSR1)" in run.output
    note(f"warned by --signal, checkpoint at step {run.attempts()[1]['step']}, requeued and started again")


def test_scontrol_requeue_saves_and_resumes(workspace, reference, note):
    run = workspace.submit("requeued")
    run.wait_for_step(12)
    workspace.cluster.slurm("scontrol", "requeue", run.job)
    run.wait_for(lambda: len(run.attempts()) == 2, "a second start")
    resumed_at = run.attempts()[1]["step"]
    assert resumed_at >= 12
    record = assert_same_result(run, reference)
    assert record["Restarts"] == "1", "requeued by SLURM, not a second time by the script"
    note(
        f"SIGTERM: checkpoint at step {resumed_at}; resumed, COMPLETED; result equal to the uninterrupted run"
    )


def test_a_cancelled_job_saves_and_stays_cancelled(workspace, note):
    run = workspace.submit("cancelled")
    run.wait_for_step(7)
    workspace.cluster.slurm("scancel", run.job)
    record = run.wait_for_end()
    assert record["JobState"] == "CANCELLED"
    time.sleep(8)
    assert run.record()["JobState"] == "CANCELLED", "not brought back by its own script"
    assert run.state()["state"] == "preempted"
    note(f"checkpoint at step {run.state()['step']}, CANCELLED, not requeued")


def test_a_killed_rank_is_requeued_after_progress(workspace, reference, note):
    run = workspace.submit("killed")
    run.wait_for_step(12)
    os.kill(run.rank_pid(1), signal.SIGKILL)
    killed = time.monotonic()
    run.wait_for(lambda: "requeue" in run.output, "the requeue")
    seconds = time.monotonic() - killed
    assert_same_result(run, reference)
    step = run.attempts()[1]["step"]
    note(f"all ranks ended and the job requeued after {seconds:.0f} s, from step {step}; equal result")


def test_a_rank_killed_before_any_checkpoint_fails_the_job(workspace, note):
    run = workspace.submit("killed-early", sets=("checkpoint.every_steps=1000", "training.steps=1000"))
    run.wait_for_step(3)
    os.kill(run.rank_pid(0), signal.SIGKILL)
    record = run.wait_for_end()
    assert record["JobState"] == "FAILED"
    assert record["ExitCode"] != "0:0"
    assert "not requeued" in run.output
    note(f"FAILED with exit code {record['ExitCode']}, not requeued: nothing would be gained")


def test_a_hung_rank_ends_by_the_time_limit_of_collectives(workspace, reference, note):
    run = workspace.submit("hung", sets=("distributed.timeout_minutes=0.3",))
    run.wait_for_step(12)
    os.kill(run.rank_pid(1), signal.SIGSTOP)
    stopped = time.monotonic()
    run.wait_for(lambda: "requeue" in run.output, "the requeue")
    seconds = time.monotonic() - stopped
    assert_same_result(run, reference)
    note(f"a stopped rank: the others failed, and the job was requeued, after {seconds:.0f} s; equal result")


@pytest.mark.parametrize("node", ["n2", "n1"])
def test_a_node_cut_off_is_replaced_and_writes_nothing_more(workspace, reference, note, node):
    """n1 has the batch script and rank 0, which writes checkpoints, state and lock."""
    run = workspace.submit(f"cut-{node}")
    run.wait_for_step(12)
    old_rank = run.rank_pid(0 if node == "n1" else 1)
    started = start_time(old_rank)
    workspace.cluster.link(node, "down")
    cut = time.monotonic()
    run.wait_for(lambda: run.record()["JobState"] == "PENDING", "the requeue by SLURM")
    seconds = time.monotonic() - cut
    assert start_time(old_rank) == started, "the drill is about a rank that outlives its job"
    before = files_of(run.path)
    time.sleep(5)
    changed = {name for name, stamp in files_of(run.path).items() if before.get(name) != stamp}
    assert changed <= {"lock.json"}, "the rank on the dead node wrote into the run folder"
    if node == "n1":
        # SLURM 22.05 fails a job that starts on its old batch node in the second of that node's return.
        workspace.cluster.slurm("scontrol", "hold", run.job)
    workspace.cluster.link(node, "up")
    run.wait_for(lambda: start_time(old_rank) != started, "the end of the old rank")
    if node == "n1":
        state = ("sinfo", "-h", "-n", node, "-o", "%T")
        run.wait_for(lambda: workspace.cluster.slurm(*state).strip() == "idle", "the return of the node")
        time.sleep(2 * CREDENTIAL_SECONDS)
        workspace.cluster.slurm("scontrol", "release", run.job)
    assert_same_result(run, reference)
    step = run.attempts()[1]["step"]
    note(
        f"requeued after {seconds:.0f} s, the old rank alive but writing nothing; resumed from {step}; equal"
    )
