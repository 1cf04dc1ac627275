"""What a crash or a stranger left in a run folder hinders neither its next start, nor `status`, nor a requeue."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from bico_ds.checkpoint import manifest, record
from bico_ds.checkpoint.checkpointer import Checkpointer
from bico_ds.checkpoint.resume import choose, set_aside
from bico_ds.cluster.attempts import RESTARTS_USED_UP, TRY_AGAIN, begin, end, newest_step
from bico_ds.cluster.run_status import find_runs, read_statuses
from bico_ds.commands.slurm import status as command
from bico_ds.commands.slurm.status import make_table
from bico_ds.common.errors import RunError, UserError
from bico_ds.config.load import dump_recipe
from bico_ds.config.sections.checkpoint import CheckpointSpec
from bico_ds.runtime import lock
from bico_ds.runtime.lock import FencedError, living_locks, read_lock
from bico_ds.runtime.run_folder import RunFolder, read_state
from tests.checkpoint.test_resume import LAYOUT, RECIPE, checkpoint, steps_in
from tests.cpu_time import cpu_seconds_below
from tests.damaged_files import damaged

FOREIGN = (
    *("step-000002.bak", "step-foo", "step-", "step--1", "step-00000２", "step-000004 (copy)", "step-2", "step-000002~"),
    *("step-000003.json.bak", "replaced-x", "job-x.sbatch", "latest.old"),
)  # fmt: skip
FILES = (
    *("state.json", "run.json", "recipe.yaml", "lock.json", "last_checkpoint.json", "metrics.jsonl"),
    *("slurm/jobs.jsonl", "slurm/attempts.jsonl", "slurm/recipe.yaml", "evaluation/step-000004.json"),
    "checkpoints/step-000004/manifest.json",
)


@pytest.fixture(autouse=True)
def _quick_locks(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that was stopped at step 4, and evaluated there."""
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.path.mkdir(parents=True)
    folder.lock.write_heartbeat()
    for step in (2, 4):
        checkpoint(folder.checkpoints / f"step-{step:06d}", step)
    record.write(folder, folder.checkpoints / "step-000004", 4)
    folder.write_state("preempted", step=4, reason="SIGTERM")
    folder.recipe_file.write_text(dump_recipe(RECIPE))
    (folder.path / "run.json").write_text('[{"run_id": "r"}]')
    lines = [{"step": step, "kind": "train", "loss/all": 1.5} for step in range(1, 5)]
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder.path / "slurm").mkdir()
    (folder.path / "slurm" / "recipe.yaml").write_text(dump_recipe(RECIPE))
    (folder.path / "slurm" / "jobs.jsonl").write_text('{"job": "5", "script": "x", "time": 1.0}\n')
    begin(folder.path, job="1", restarts=0, limit=3)
    folder.evaluation.mkdir()
    folder.evaluation_file(4).write_text('{"tasks": {}}')
    folder.lock.path.unlink()
    return folder.path


def start(run: Path) -> int | None:
    """What a start does with the folder until it trains; returns the step that it goes on from, None for the beginning."""
    folder = RunFolder(run)
    record.refuse_lost(folder)
    folder.check_writable()
    found = choose(folder, "auto", RECIPE, LAYOUT)
    folder.open()
    folder.write_state("running", step=found.step if found else 0)
    set_aside(folder, "auto", found)
    folder.record(RECIPE)
    folder.close()
    return found.step if found is not None else None


def shown(*runs: Path) -> str:
    """The table of `status`."""
    console = Console(file=io.StringIO(), width=400)
    console.print(make_table(read_statuses(runs, on_watch=lambda count, seconds: None)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def place_foreign(run: Path) -> list[Path]:
    placed = []
    for folder in (run, run / "checkpoints", run / "evaluation", run / "slurm"):
        for name in FOREIGN:
            (folder / name).mkdir()
            (folder / name / "manifest.json").write_text("{}")
            placed.append(folder / name)
    return placed


def test_names_of_others_hinder_no_start_and_stay_where_they_are(run):
    placed = place_foreign(run)
    (run / "evaluation" / "step-foo.json").write_text("{}")
    assert newest_step(run) == 4
    assert start(run) == 4
    assert all(path.is_dir() for path in placed)
    assert steps_in(RunFolder(run)) == [2, 4]
    assert read_statuses([run])[0].checkpoint == 4
    assert begin(run, job="1", restarts=1, limit=3).exit_code == 0
    assert end(run, srun_code=1, stopped=False, restarts=3, limit=3).exit_code != RESTARTS_USED_UP
    assert (RunFolder(run).new_aside()).name == "replaced-1"


def saver(folder: RunFolder) -> Checkpointer:
    return Checkpointer(CheckpointSpec(keep_last=1), folder, None, exclude_frozen=False, header={})  # type: ignore[arg-type]


def test_a_job_that_runs_commits_and_prunes_its_own_alone(run):
    placed = place_foreign(run)
    folder = RunFolder(run)
    folder.open()
    (folder.checkpoints / "step-000003").mkdir()  # no checkpoint: it has no manifest
    partial = folder.checkpoints / ".step-000005.0123456789ab.incomplete"
    partial.mkdir()
    assert saver(folder)._commit(partial, 5, {"files": {}}) is None
    folder.close()
    assert all(path.is_dir() for path in [*placed, folder.checkpoints / "step-000003"])
    assert steps_in(folder) == [3, 5]


@pytest.mark.parametrize("kind", ["file", "dangling link", "folder behind a link"])
def test_what_lies_where_a_checkpoint_belongs_is_kept_and_the_checkpoint_written(run, tmp_path, kind):
    folder = RunFolder(run)
    folder.open()
    place = folder.checkpoints / "step-000005"
    (tmp_path / "mine").mkdir()
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "mine" if "folder" in kind else "/nowhere")
    (folder.checkpoints / "latest").mkdir()
    partial = folder.checkpoints / ".step-000005.0123456789ab.incomplete"
    partial.mkdir()
    assert saver(folder)._commit(partial, 5, {"files": {}}) is None
    folder.close()
    assert steps_in(folder) == [5]
    assert (folder.checkpoints / "latest").read_text() == "step-000005\n"
    kept = run / "replaced-1" / "step-000005"
    assert kept.is_symlink() or kept.read_text() == "mine"
    assert (tmp_path / "mine").is_dir()
    assert newest_step(run) == 5


def test_a_name_of_a_later_step_is_set_aside_before_the_steps_are_done(run):
    folder = RunFolder(run)
    (folder.checkpoints / "step-000006").write_text("mine")
    (folder.checkpoints / "step-000008").symlink_to("/nowhere")
    assert start(run) == 4
    assert (run / "replaced-1" / "step-000006").read_text() == "mine"
    assert (run / "replaced-1" / "step-000008").is_symlink()


@pytest.mark.parametrize("content", ["", '[{"run_id"', "[1]"])
def test_a_broken_run_json_is_kept_aside_and_a_new_one_begun(run, capsys, content):
    (run / "run.json").write_text(content)
    assert start(run) == 4
    (only,) = json.loads((run / "run.json").read_text())
    assert only["versions"]
    assert (run / "replaced-1" / "run.json").read_text() == content
    assert "run.json: " in capsys.readouterr().out


def test_facts_of_a_start_find_their_place_though_run_json_was_damaged_meanwhile(run):
    folder = RunFolder(run)
    folder.open()
    folder.record(RECIPE)
    (run / "run.json").write_text("")
    folder.add_to_start(work={"ntp": 1})
    folder.close()
    (only,) = json.loads((run / "run.json").read_text())
    assert (only["work"], only["run_id"]) == ({"ntp": 1}, folder.lock.run_id)


@pytest.mark.parametrize("content", ["", "[]", '{"state": "done", "step": "x", "time": null}', "\xff"])
def test_a_broken_state_counts_as_unknown_and_is_written_anew(run, content):
    (run / "state.json").write_text(content, encoding="latin-1")
    assert (read_state(run / "state.json") or {}).get("step") is None
    assert start(run) == 4
    state = read_state(run / "state.json")
    assert state is not None and (state["state"], state["step"]) == ("running", 4)


def test_an_end_with_a_broken_state_is_judged_by_its_checkpoints(run):
    (run / "state.json").write_text("")
    verdict = end(run, srun_code=1, stopped=False, restarts=0, limit=3)
    assert verdict.exit_code == 1 and "state.json' is broken" in verdict.why
    assert end(run, srun_code=0, stopped=False, restarts=0, limit=3).exit_code == 1, (
        "0 of srun proves nothing"
    )
    assert end(run, srun_code=138, stopped=True, restarts=0, limit=3).exit_code == TRY_AGAIN
    checkpoint(run / "checkpoints" / "step-000006", 6)
    assert end(run, srun_code=1, stopped=False, restarts=0, limit=3).exit_code == TRY_AGAIN


def test_a_start_after_one_whose_line_was_cut_is_recorded_on_a_line_of_its_own(run):
    attempts = run / "slurm" / "attempts.jsonl"
    attempts.write_text(attempts.read_text() + '{"job": "1", "rest')
    assert begin(run, job="1", restarts=1, limit=3).exit_code == 0
    assert json.loads(attempts.read_text().splitlines()[-1])["restarts"] == 1
    attempts.unlink()
    attempts.mkdir()
    with pytest.raises(RunError, match="attempts.jsonl: a folder, not a file; move it away"):
        begin(run, job="1", restarts=1, limit=3)
    assert end(run, srun_code=0, stopped=False, restarts=0, limit=3).exit_code == 1


@pytest.mark.parametrize("name", ["state.json", "run.json", "recipe.yaml", "metrics.jsonl"])
def test_a_folder_where_a_file_belongs_is_refused_before_the_run(run, name):
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(UserError, match=f"{name}' is no file; move it away"):
        start(run)
    shown(run)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"step": 1e3, "path": "x", "time": 0}', "\xff", "[" * 9999]
)
def test_a_damaged_record_never_lets_a_run_begin_anew(run, content):
    (run / "last_checkpoint.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="last_checkpoint.json: damaged; remove it to go on"):
        start(run)
    assert "last_checkpoint.json: damaged" in read_statuses([run])[0].reason
    (run / "last_checkpoint.json").unlink()
    assert start(run) == 4


def test_a_broken_evaluation_of_the_step_is_kept_aside_and_owed_again(run):
    (run / "evaluation" / "step-000004.json").write_text('{"tasks": ')
    assert start(run) == 4
    folder = RunFolder(run)
    assert not folder.has_evaluation(4)
    assert (run / "replaced-1" / "step-000004.json").read_text() == '{"tasks": '
    folder.evaluation_file(4).write_text("{}")
    assert folder.has_evaluation(4) and not folder.has_evaluation(6)


def readings(folder: RunFolder) -> Iterator[Callable[[], object]]:
    """What reads the files of a run: `status`, the batch script's judgements, and a start."""
    run = folder.path
    yield lambda: shown(run)
    yield lambda: begin(run, job="1", restarts=1, limit=9)
    yield lambda: end(run, srun_code=1, stopped=False, restarts=0, limit=3)
    yield lambda: folder.preempt("SIGTERM in start-up")
    yield folder._recorded_starts
    yield lambda: set_aside(folder, "auto", choose(folder, "auto", RECIPE, LAYOUT))


def test_any_damage_of_any_file_of_a_run_is_survived_by_a_start_status_and_requeue(run):
    """Within one CPU second each, with no error but the user's; and no start begins anew where checkpoints are."""
    RunFolder(run).lock.write_heartbeat()
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name, content in [(file, x) for file in FILES for x in damaged(kept[run / file], count=2)]:
        shutil.rmtree(run)
        for path, before in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(before if path != run / name else content)
        folder = RunFolder(run)
        held = read_lock(folder.lock.path)
        folder.lock.run_id = held.run_id if held is not None else ""
        for read in readings(folder):
            with cpu_seconds_below(1, content[:200]):
                try:
                    read()
                except (UserError, FencedError) as error:
                    complaint = (
                        "lost the folder"
                        if name == "lock.json"
                        else "last_checkpoint.json: damaged; remove it"
                    )
                    assert complaint in str(error), content[:200]  # noqa: PT017
        assert steps_in(folder)[0] == 2


LOCK = {"run_id": "x", "host": "elsewhere", "pid": 7, "job": "", "heartbeat": 1.0}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"pid": "x"}, {"pid": -1}, {"pid": 0}, {"pid": 10**30}, {"pid": None}, {"pid": True}, {"host": None}),
        *({"run_id": []}, {"job": 3}, {"heartbeat": float("nan")}, {"heartbeat": None}, {"heartbeat": "x"}),
    ],
)  # fmt: skip
def test_a_lock_of_wrong_types_is_none_and_is_taken(tmp_path, wrong):
    folder = RunFolder(tmp_path)
    folder.lock.path.write_text(json.dumps(LOCK | {"host": os.uname().nodename} | wrong))
    assert read_lock(folder.lock.path) is None
    assert living_locks([folder.lock.path]) == {}
    folder.open()
    folder.close()


def test_a_lock_stamped_tomorrow_is_watched_and_is_nobodys(tmp_path):
    folder = RunFolder(tmp_path)
    tomorrow = time.time() + 86_400
    folder.lock.path.write_text(json.dumps(LOCK | {"heartbeat": tomorrow}))
    os.utime(folder.lock.path, (tomorrow, tomorrow))
    watched: list[int] = []
    assert living_locks([folder.lock.path], on_watch=lambda count, seconds: watched.append(count)) == {}
    assert watched == [1]
    folder.open()
    folder.close()


def test_status_shows_what_is_known_of_a_run_with_broken_files(run):
    for name in ("run.json", "slurm/jobs.jsonl", "slurm/attempts.jsonl"):
        (run / name).write_text("")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('garbage\n{"kind": "train", "step": \n{"kind": "train"\xff}\n')
    (status,) = read_statuses([run])
    assert (status.state, status.step, status.checkpoint, status.loss) == ("preempted", 4, 4, 1.5)
    assert status.reason == "run.json: empty; SIGTERM"
    (run / "state.json").write_text('{"state": "run')
    (status,) = read_statuses([run])
    assert (status.state, status.step, status.checkpoint) == ("unreadable", 4, 4)
    assert "state.json: not valid JSON" in status.reason


def test_a_reason_is_text_and_neither_markup_nor_control_characters(run, tmp_path):
    reason = "[/red] [bold]\x1b[31m\nnext\u202e \ud83d " + "x" * 1_000_000
    content = json.loads((run / "state.json").read_text()) | {"reason": reason}
    (run / "state.json").write_text(json.dumps(content))
    renamed = run.rename(run.with_name("a[red]\n[nope"))
    table = shown(renamed)
    assert "[/red] [bold] [31m next" in table and "a[red] [nope" in table
    assert "\x1b" not in table and len(table) < 5000
    (status,) = read_statuses([renamed])
    assert len(status.reason) == 1000 and status.reason.isprintable()


@pytest.mark.parametrize(
    "recipe",
    ["", "[]", "training: [", "training: {steps: x}", "[" * 100_000, "\0", "training:\n  steps: \u0663\n"],
)
def test_a_recipe_that_is_none_makes_one_line_of_status_at_once(run, recipe):
    (run / "recipe.yaml").write_text(recipe)
    with cpu_seconds_below(1):
        (status,) = read_statuses([run])
    assert (status.state, status.step, status.total_steps) == ("unreadable", 4, None)
    assert status.reason.startswith("recipe.yaml: ")


def test_the_steps_of_a_recipe_are_found_however_it_is_written(run):
    for recipe in (
        "training: {steps: 7}",
        "a: [{steps: 3}]\ntraining:\n  x: {steps: 2}\n  steps: 7 # so many\nsteps: 1\n",
    ):
        (run / "recipe.yaml").write_text(recipe)
        assert read_statuses([run])[0].total_steps == 7
    (run / "recipe.yaml").write_text("training: {steps: null, epochs: 2}")
    assert read_statuses([run])[0].total_steps is None


def test_links_in_a_circle_end_the_search_for_runs(run):
    runs = run.parent
    for name in ("b", "c"):
        (runs / name).mkdir()
        for other in ("b", "c", ".."):
            (runs / name / f"to-{other.strip('.')}").symlink_to(runs / other)
    (runs / "self").symlink_to("self")
    assert list(find_runs([runs])) == [run]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_a_folder_without_permission_is_one_line_and_the_others_are_shown(run, capsys):
    with tempfile.TemporaryDirectory() as root:  # which another user may reach
        runs = shutil.copytree(run.parent, Path(root) / "runs")
        for path in [Path(root), *Path(root).rglob("*")]:
            path.chmod(path.stat().st_mode | 0o055)
        for name in ("closed", "unlisted"):
            (runs / name / "inside").mkdir(parents=True)
            (runs / name).chmod(0o000 if name == "closed" else 0o644)
        os.seteuid(65534)
        try:
            assert command.main([str(runs), "--json"]) == 0
        finally:
            os.seteuid(0)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(Path(line["run"]).name, line["state"]) for line in lines] == [
        ("a", "preempted"), ("closed", "unreadable"), ("unlisted", "unreadable")
    ]  # fmt: skip
    assert lines[1]["reason"] == "closed: Permission denied"


def test_sealed_checkpoints_alone_count(run):
    (run / "checkpoints" / "step-000009").mkdir()
    assert [manifest.step_of(path) for path in manifest.sealed_in(run / "checkpoints")] == [2, 4]
    assert newest_step(run) == 4
