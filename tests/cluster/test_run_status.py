"""The status table: from run folders as real runs leave them, and from damaged ones."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time

import pytest

from bico_ds.cluster.run_status import find_runs, read_statuses
from bico_ds.cluster.submission import refuse_if_alive
from bico_ds.commands.slurm import status as command
from bico_ds.common.errors import UserError
from bico_ds.config.load import dump_recipe, load_recipe
from tests.common.whole_words import check_whole


def hold(run, *, beat, run_id="new", job="78"):
    """A lock whose last heartbeat was `beat` seconds ago, by a holder whose clock is an hour behind."""
    lock = {"run_id": run_id, "host": "n1", "pid": 1, "job": job, "heartbeat": time.time() - beat - 3600}
    (run / "lock.json").write_text(json.dumps(lock))
    os.utime(run / "lock.json", (time.time() - beat,) * 2)


def read_status(run):
    (status,) = read_statuses([run])
    return status


def a_run(folder, *, state="running", beat=0.0, lines=(10, 20), starts=1):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe("tiny_base")))
    now = time.time()
    recorded = {"state": state, "step": None, "reason": "", "run_id": "r", "time": now}
    (folder / "state.json").write_text(json.dumps(recorded))
    (folder / "run.json").write_text(json.dumps([{"run_id": str(n)} for n in range(starts)]))
    hold(folder, run_id="r", job="77", beat=beat)
    speed = {"loss/all": 1.5, "speed/represented_tokens_per_second": 2000.0}
    records = [{"step": step, "kind": "train", **speed} for step in lines]
    records.append({"step": lines[-1], "kind": "checkpoint", "speed/checkpoint_seconds": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    checkpoint = folder / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    return folder


def test_a_running_run_says_where_it_is(tmp_path):
    status = read_status(a_run(tmp_path / "a", starts=3))
    assert (status.state, status.step, status.total_steps) == ("running", 20, 300)
    assert (status.loss, status.tokens_per_second, status.checkpoint) == (1.5, 2000.0, 10)
    assert (status.starts, status.job) == (3, "77")


@pytest.mark.parametrize("width", [80, 60, 40])
def test_the_table_has_every_word_whole(tmp_path, monkeypatch, width):
    runs = [a_run(tmp_path / name) for name in ("tiny_bico", "tiny_ntp", "seed-11/smollm2_135m_bico_keep")]
    (runs[1] / "state.json").write_text(
        json.dumps({"state": "failed", "reason": "rank 1 ended: no space left on n1"})
    )
    monkeypatch.chdir(tmp_path)
    table = command.make_table(read_statuses(runs))
    check_whole(lambda console: console.print(table), width, may_differ={"run"}, names_may_break=True)


def test_a_run_that_nobody_lives_behind_is_lost(tmp_path):
    assert read_status(a_run(tmp_path / "a", beat=1000.0)).state == "lost"
    assert read_status(a_run(tmp_path / "b", beat=1000.0, state="done")).state == "done"


@pytest.mark.parametrize("earlier", ["done", "failed", "preempted", "running"])
def test_who_holds_the_folder_and_does_not_train_yet_is_starting(tmp_path, earlier):
    run = a_run(tmp_path / "a", state=earlier)
    hold(run, beat=1.0)
    assert read_status(run).state == "starting"
    hold(run, beat=1000.0)
    assert read_status(run).state == ("lost" if earlier == "running" else earlier)


def test_a_first_start_is_found_and_is_lost_when_it_died(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    hold(run, beat=1.0)
    assert [read_status(found).state for found in find_runs([tmp_path])] == ["starting"]
    hold(run, beat=1000.0)
    assert read_status(run).state == "lost"


def test_a_run_with_a_broken_file_hides_no_other(tmp_path):
    runs = [a_run(tmp_path / name) for name in "abc"]
    (runs[0] / "state.json").write_text('{"state": "run')
    (runs[1] / "recipe.yaml").write_text("training: [")
    assert [status.state for status in read_statuses(runs)] == ["unreadable", "unreadable", "running"]


def test_a_run_whose_newest_checkpoint_is_gone_says_so(tmp_path):
    run = a_run(tmp_path / "a", state="preempted")
    written = {"step": 10, "path": "checkpoints/step-000010", "time": 0.0}
    (run / "last_checkpoint.json").write_text(json.dumps(written))
    assert read_status(run).reason == ""
    shutil.rmtree(run / "checkpoints")
    status = read_status(run)
    assert (status.checkpoint, status.reason) == (0, "checkpoint of step 10 is gone")


def test_a_line_cut_by_a_crash_is_passed_over(tmp_path):
    run = a_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "kind": "train", "loss/a')
    assert read_status(run).step == 20


def test_a_submitted_run_waits(tmp_path):
    slurm = tmp_path / "a" / "slurm"
    slurm.mkdir(parents=True)
    (slurm / "recipe.yaml").write_text(dump_recipe(load_recipe("tiny_base")))
    (slurm / "jobs.jsonl").write_text('{"job": "5"}\n{"job": "6"}\n')
    status = read_status(tmp_path / "a")
    assert (status.state, status.step, status.total_steps, status.job) == ("waiting", None, 300, "6")


def test_runs_are_found_below_and_not_inside_of_others(tmp_path):
    a_run(tmp_path / "sweep" / "a")
    a_run(tmp_path / "sweep" / "a" / "replaced-1")
    a_run(tmp_path / "b")
    assert list(find_runs([tmp_path])) == [tmp_path / "b", tmp_path / "sweep" / "a"]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_shows_every_run(tmp_path, monkeypatch, capsys, as_json):
    a_run(tmp_path / "first")
    a_run(tmp_path / "second", state="failed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["status.py", *(["--json"] if as_json else []), str(tmp_path)])
    assert command.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "first" in line or "second" in line]
    assert len(lines) == 2
    assert "running" in lines[0]
    assert "failed" in lines[1]
    if as_json:
        assert json.loads(lines[0])["step"] == 20


def test_the_user_is_told_why_an_answer_takes_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bico_ds.runtime.lock.HEARTBEAT_SECONDS", 0.4)
    runs = [a_run(tmp_path / name, beat=100.0) for name in ("a", "b")]
    assert command.main([str(tmp_path), "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "watching 2 locks for up to 1 seconds …\n"
    assert [json.loads(line)["state"] for line in shown.out.splitlines()] == ["lost", "lost"]
    with pytest.raises(UserError, match="cannot read '.*lock.json'"):
        refuse_if_alive([runs[0] / "state.json"])
    refuse_if_alive(runs)
    assert "watching 2 locks" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["status.py", str(tmp_path / "none")])
    assert command.main() == 2
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-1", "0", "nan"])
def test_a_watch_without_time_between_is_wrong_usage(monkeypatch, tmp_path, capsys, seconds):
    monkeypatch.setattr(sys, "argv", ["status.py", str(tmp_path), "-w", seconds])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "--watch" in capsys.readouterr().err
