"""One writer a run folder: the lock, the fence, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from bico_ds.common.errors import UserError
from bico_ds.common.files import write_atomically
from bico_ds.config.load import load_recipe
from bico_ds.runtime import run_folder
from bico_ds.runtime.run_folder import FencedError, RunFolder, read_lock, read_state


@pytest.fixture(autouse=True)
def _fast_hearts(monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_folder, "WATCH_SECONDS", 1.2)
    monkeypatch.setattr(run_folder, "SETTLE_SECONDS", 0.05)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def recipe():
    return load_recipe("tiny_base", [])


def write_lock(folder: RunFolder, *, pid: int, host: str | None = None) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = {
        "run_id": "other",
        "host": host or run_folder.socket.gethostname(),
        "pid": pid,
        "job": "",
        "heartbeat": 0.0,
    }
    folder.lock_file.write_text(json.dumps(lock))


def test_a_second_run_in_a_living_runs_folder_is_refused(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open()
    with pytest.raises(UserError, match=f"in use by run {first.run_id}"):
        second.open()
    first.check_fence()
    first.close()
    second.open()
    second.close()
    assert not second.lock_file.exists()


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path):
    folder = RunFolder(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_lock(folder, pid=dead.pid)
    started = time.monotonic()
    folder.open()
    assert time.monotonic() - started < 1.0
    folder.close()


def test_the_lock_of_a_silent_node_is_taken_over_after_a_watch_whatever_its_clock_says(tmp_path):
    folder = RunFolder(tmp_path)
    write_lock(folder, pid=os.getpid(), host="a-node-that-is-gone")
    folder.open()
    lock = read_lock(folder.lock_file)
    assert lock is not None
    assert lock.run_id == folder.run_id
    folder.close()


def test_an_older_writer_is_fenced_off_and_told(tmp_path):
    old, new = RunFolder(tmp_path), RunFolder(tmp_path)
    lost: list[bool] = []
    old.on_lost = lambda: lost.append(True)
    old.open()
    new._write_lock()  # as if the old one had been cut off, and watched in silence
    with pytest.raises(FencedError, match="lost the folder"):
        old.write_state("running", step=1)
    time.sleep(0.6)
    assert lost
    old.close()
    new.check_fence()


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into .*--output-dir"):
        RunFolder(tmp_path / "file" / "run").open()


def test_starting_anew_keeps_what_was_there(tmp_path, recipe):
    folder = RunFolder(tmp_path)
    folder.open()
    folder.record(recipe)
    (folder.checkpoints / "step-000010").mkdir(parents=True)
    folder.metrics_file.write_text("{}\n")
    attempts = folder.path / "slurm" / "attempts.jsonl"
    attempts.parent.mkdir()
    attempts.write_text("of the batch script that runs\n")
    folder.set_aside()
    assert (tmp_path / "replaced-1" / "recipe.yaml").is_file()
    assert attempts.is_file()
    assert (tmp_path / "replaced-1" / "checkpoints" / "step-000010").is_dir()
    assert (tmp_path / "replaced-1" / "metrics.jsonl").read_text() == "{}\n"
    assert not folder.metrics_file.exists()
    folder.set_aside()
    assert not (tmp_path / "replaced-2").exists()
    folder.close()


def leave_a_run(path, recipe, state):
    folder = RunFolder(path)
    folder.open()
    folder.write_state(state, step=7, reason="of old")
    folder.record(recipe)
    folder.close()


def said_by(folder: RunFolder) -> tuple[str, int | None, str]:
    said = read_state(folder.state_file)
    assert said is not None
    return said["state"], said["step"], said["reason"]


@pytest.mark.parametrize("earlier", ["running", "preempted", "done", "failed"])
def test_a_start_that_fails_before_it_trains_leaves_the_state_of_an_earlier_run(tmp_path, recipe, earlier):
    leave_a_run(tmp_path, recipe, earlier)
    folder = RunFolder(tmp_path)
    folder.open()
    before = folder.state_file.read_bytes()
    folder.fail("refused")
    assert folder.state_file.read_bytes() == before
    folder.write_state("running", step=7)
    folder.fail("broken off")
    assert said_by(folder) == ("failed", None, "broken off")
    folder.close()


def test_first_starts_that_fail_say_so(tmp_path):
    for reason in ("a typo", "another one"):
        folder = RunFolder(tmp_path)
        folder.open()
        folder.fail(reason)
        folder.close()
        assert said_by(folder) == ("failed", None, reason)


@pytest.mark.parametrize("earlier", [None, "running", "preempted", "done", "failed"])
def test_a_start_stopped_before_it_trains_is_preempted_and_a_finished_run_stays_done(
    tmp_path, recipe, earlier
):
    if earlier is not None:
        leave_a_run(tmp_path, recipe, earlier)
    folder = RunFolder(tmp_path)
    folder.open()
    folder.preempt("SIGTERM in start-up")
    folder.close()
    expected = ("preempted", None if earlier is None else 7, "SIGTERM in start-up")
    assert said_by(folder) == (("done", 7, "of old") if earlier == "done" else expected)


def test_secrets_of_the_command_line_are_not_recorded(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", "--set", "deepspeed.overrides.hub.api_key=abc123", "--set", "model.tokenizer=a"],
    )
    folder = RunFolder(tmp_path)
    folder.open()
    folder.record(recipe)
    folder.close()
    recorded = (tmp_path / "run.json").read_text()
    assert "abc123" not in recorded
    assert "model.tokenizer=a" in recorded


def test_small_files_are_replaced_whole(tmp_path):
    file = tmp_path / "state.json"
    write_atomically(file, json.dumps({"state": "running"}))
    write_atomically(file, json.dumps({"state": "done"}))
    assert read_state(file) == {"state": "done"}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
