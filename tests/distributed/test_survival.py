"""A run is stopped, killed, resumed, resumed by fewer ranks: it must end as the one that nothing happened to."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bico_ds.runtime.run_folder import RunFolder
from tests.distributed.launching import end_tree, last_step, ranks_of, start, train, wait_until
from tests.distributed.survival import (
    EVERY,
    RECIPE,
    SMALL,
    STEPS,
    assert_same_course,
    curve,
    final_manifest,
    log,
    state,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def listening(ranks: list[psutil.Process]) -> list[str]:
    """The addresses on which these processes listen."""
    found = [connection for rank in ranks for connection in rank.net_connections("inet")]
    return [connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("survival") / "straight"
    done = train(RECIPE, run, *SMALL, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture(scope="module")
def battered(straight) -> Path:
    """SIGTERM to one rank in training: all agree."""
    run = straight.with_name("battered")
    command = start(RECIPE, run, *SMALL)
    try:
        wait_until(lambda: last_step(run) >= 7, command, timeout=400)
        (straight.with_name("listening.json")).write_text(json.dumps(listening(ranks_of(command))))
        ranks_of(command)[1].send_signal(signal.SIGTERM)
        assert command.wait(timeout=300) == 0
    finally:
        end_tree(command)
    return run


@pytest.fixture(scope="module")
def stopped_state(battered) -> dict:
    return state(battered)


@pytest.fixture(scope="module")
def resumed(battered, stopped_state) -> Path:
    """Killed once more, then resumed to the end."""
    begun = last_step(battered)
    command = start(RECIPE, battered, *SMALL)
    try:
        wait_until(lambda: last_step(battered) >= min(begun + EVERY + 2, STEPS - 2), command, timeout=400)
        ranks_of(command)[1].kill()
        command.wait(timeout=300)
    finally:
        end_tree(command)
    (battered.with_name("killed.log")).write_text(str(command.returncode))
    (battered.with_name("killed.json")).write_text((battered / "state.json").read_text())
    done = train(RECIPE, battered, *SMALL, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return battered


def test_sigterm_leaves_a_checkpoint_of_the_step_and_says_preempted(battered, stopped_state):
    assert stopped_state["state"] == "preempted"
    assert 7 <= stopped_state["step"] < STEPS
    assert (battered / "checkpoints" / f"step-{stopped_state['step']:06d}" / "manifest.json").is_file()


def test_a_second_job_in_the_same_folder_is_refused(tmp_path):
    holder = RunFolder(tmp_path / "held")
    holder.open()
    done = train(RECIPE, holder.path, *SMALL, timeout=400)
    assert done.returncode == 2
    assert done.stderr.count(f"in use by run {holder.lock.run_id}") == 1
    assert "Traceback" not in done.stderr
    holder.lock.check()
    holder.close()


def test_a_killed_rank_fails_the_whole_job(resumed):
    assert int(resumed.with_name("killed.log").read_text()) != 0


def test_a_killed_rank_is_named_by_the_command_and_in_the_state(resumed):
    recorded = json.loads(resumed.with_name("killed.json").read_text())
    assert (recorded["state"], recorded["reason"]) == ("failed", "RunError: rank 1: the process is gone")
    assert log(resumed).count("error: rank 1: the process is gone") == 1


def test_ranks_of_one_node_listen_where_no_other_machine_reaches_them(battered):
    found = json.loads(battered.with_name("listening.json").read_text())
    assert found and set(found) == {"127.0.0.1"}


def test_the_resumed_run_is_bit_identical_to_the_uninterrupted_one(resumed, straight):
    assert_same_course(resumed, straight)
    assert state(resumed)["state"] == "done"


def test_tensorboard_shows_no_step_twice(resumed):
    events = EventAccumulator(str(resumed / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("2 loss/all")] == list(range(1, STEPS + 1))


def test_one_rank_goes_on_from_the_checkpoint_of_two(straight, tmp_path):
    """Through the universal format, without a flag; the newest checkpoint is damaged and passed over."""
    run = tmp_path / "elastic"
    shutil.copytree(straight, run)
    newest = run / "checkpoints" / f"step-{STEPS:06d}"
    damaged = next(newest.glob("*optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    done = train(RECIPE, run, *SMALL, ranks=1, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"damaged checkpoint passed over: {damaged}" in done.stdout
    assert f"step-{STEPS - EVERY:06d}" in done.stdout
    assert "converting" in done.stdout
    assert [step for step, *_ in curve(run)] == list(range(1, STEPS + 1))
    ours, theirs = ([loss for _, loss, *_ in curve(folder)] for folder in (run, straight))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert final_manifest(run)["state"]["loader"] == final_manifest(straight)["state"]["loader"]
    assert final_manifest(run)["layout"]["ranks"] == 1
