"""What a run folder keeps, and what becomes of an earlier run's: nothing is lost."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.runtime import lock
from bico_ds.runtime.run_folder import RunFolder, read_state
from tests.full_disk import room_for_no_new_file


@pytest.fixture(autouse=True)
def _quick_locks(monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)


@pytest.fixture
def recipe():
    return load_recipe("tiny_base", [])


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into .*--output-dir"):
        RunFolder(tmp_path / "file" / "run").open()


def dangling(path):
    path.symlink_to("/nowhere/mounted")


def a_file(path):
    path.write_text("")


@pytest.mark.parametrize("name", ["checkpoints", "evaluation", "tensorboard", "csv"])
@pytest.mark.parametrize(
    ("spoil", "why"), [(dangling, "a link to '/nowhere/mounted'"), (a_file, "no folder")]
)
def test_what_could_not_be_written_hours_later_is_refused_now(tmp_path, name, spoil, why):
    folder = RunFolder(tmp_path)
    folder.open()
    spoil(tmp_path / name)
    with pytest.raises(UserError, match=f"cannot write into .*{name}': it is {why}.*--output-dir"):
        folder.check_writable()
    folder.close()


@pytest.mark.parametrize("name", ["checkpoints", "evaluation", "export"])
def test_what_a_start_moves_away_need_not_be_writable(tmp_path, name):
    folder = RunFolder(tmp_path)
    folder.open()
    dangling(tmp_path / name)
    with pytest.raises(UserError, match="cannot write into"):
        folder.check_writable(begins_anew=True)  # no run was here: nothing is moved
    folder.metrics_file.write_text("{}\n")
    with pytest.raises(UserError, match="cannot write into"):
        folder.check_writable()
    folder.check_writable(begins_anew=True)
    folder.set_aside()
    assert (tmp_path / "replaced-1" / name).is_symlink()
    folder.check_writable()
    folder.close()


@pytest.mark.parametrize("name", ["export", "tokenizer"])
def test_what_is_replaced_as_a_whole_may_be_a_link_to_a_folder_that_is_still_to_come(tmp_path, name):
    folder = RunFolder(tmp_path / "run")
    folder.open()
    (folder.path / name).symlink_to(tmp_path / "elsewhere")
    folder.check_writable()
    (folder.path / name).unlink()
    dangling(folder.path / name)
    with pytest.raises(UserError, match="cannot write into '/nowhere'"):
        folder.check_writable()
    folder.close()


@pytest.mark.parametrize("name", ["run", "run/logs"])
def test_a_run_folder_on_a_disk_that_is_not_mounted_is_the_users_mistake(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    dangling(tmp_path / name)
    with pytest.raises(UserError, match="a link to '/nowhere/mounted', which is not there"):
        RunFolder(tmp_path / "run").open()


def test_a_check_of_what_can_be_written_leaves_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open()
    (tmp_path / "checkpoints").mkdir()
    before = sorted(tmp_path.rglob("*"))
    folder.check_writable()
    assert sorted(tmp_path.rglob("*")) == before
    folder.close()


def test_what_is_set_aside_never_meets_what_was_set_aside_before(tmp_path):
    folder = RunFolder(tmp_path)
    asides = [folder.new_aside() for _ in range(3)]
    asides[0].rmdir()
    assert folder.new_aside() == tmp_path / "replaced-4"


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
    folder.write_state(state, step=7, reason="earlier")
    folder.record(recipe)
    folder.close()


def recorded_by(folder: RunFolder) -> tuple[str, int | None, str]:
    state = read_state(folder.state_file)
    assert state is not None
    return state["state"], state["step"], state["reason"]


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
    assert recorded_by(folder) == ("failed", None, "broken off")
    folder.close()


def test_first_starts_that_fail_say_so(tmp_path):
    for reason in ("a typo", "another one"):
        folder = RunFolder(tmp_path)
        folder.open()
        folder.fail(reason)
        folder.close()
        assert recorded_by(folder) == ("failed", None, reason)


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
    assert recorded_by(folder) == (("done", 7, "earlier") if earlier == "done" else expected)


def test_secrets_of_the_command_line_are_not_recorded(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--set",
            "deepspeed.overrides.hub.api_key=abc123",
            "--set",
            "model.tokenizer=a",
            "--set=a={b: {password: abc123}}",
            "AWS_SECRET_ACCESS_KEY=abc123",
            "--access-token",
            "abc123",
            "https://me:abc123@host/x",
        ],
    )
    folder = RunFolder(tmp_path)
    folder.open()
    folder.record(recipe)
    folder.write_state("failed", step=1, reason="OSError: cannot reach https://me:abc123@host/x")
    folder.close()
    recorded = (tmp_path / "run.json").read_text() + (tmp_path / "state.json").read_text()
    assert "abc123" not in recorded
    assert "model.tokenizer=a" in recorded
    assert "cannot reach https://me:" in recorded


def test_metrics_without_permission_are_refused_before_the_training():
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = RunFolder(Path(root))
        folder.open()
        folder.metrics_file.write_text("{}\n")
        folder.metrics_file.chmod(0o400)
        with room_for_no_new_file(folder.path):
            with pytest.raises(
                UserError, match=r"cannot read and write '.*metrics\.jsonl': Permission denied"
            ):
                folder.check_writable()
            folder.check_writable(begins_anew=True)
        folder.close()


def test_starting_anew_keeps_the_ranks_logs_where_they_are_written(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open()
    folder.metrics_file.write_text("{}\n")
    for name in ("rank-0.log", "rank-1.log", "stacks-rank-0.txt"):
        (folder.logs / name).write_text("of the start before\n")
    with open(folder.logs / "rank-0.log", "a") as log:
        folder.set_aside()
        log.write("of this one\n")
    assert (folder.logs / "rank-0.log").read_text() == "of the start before\nof this one\n"
    assert sorted(path.name for path in folder.logs.iterdir()) == ["rank-0.log", "rank-1.log"]
    assert [path.name for path in (tmp_path / "replaced-1" / "logs").iterdir()] == ["stacks-rank-0.txt"]
    folder.close()
