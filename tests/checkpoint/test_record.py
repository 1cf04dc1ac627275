"""A run whose checkpoints are gone is told from one that never had any."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bico_ds.checkpoint import record
from bico_ds.checkpoint.resume import begins_anew, choose
from bico_ds.common.errors import UserError
from bico_ds.runtime.lock import FencedError
from bico_ds.runtime.run_folder import RunFolder
from tests.checkpoint.test_resume import LAYOUT, RECIPE, checkpoint, steps_in, taken

NEWEST = 30


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A run with checkpoints, its metrics, and a record as the commit of the newest leaves it."""
    folder = RunFolder(tmp_path / "run")
    for step in (10, 20, NEWEST):
        checkpoint(folder.checkpoints / f"step-{step:06d}", step)
    lines = [{"step": step, "kind": "train"} for step in range(1, NEWEST + 3)]
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.lock.write_heartbeat()
    record.write(folder, folder.checkpoints / f"step-{NEWEST:06d}", NEWEST)
    return folder


def remove(root: Path) -> None:
    shutil.rmtree(root)


def empty(root: Path) -> None:
    remove(root)
    root.mkdir()


def move(root: Path) -> None:
    root.rename(root.with_name("checkpoints.bak"))


def unmount(root: Path) -> None:
    remove(root)
    root.symlink_to("/nowhere/mounted")


def mount_another_disk(root: Path) -> None:
    remove(root)
    disk = root.with_name("disk")
    (disk / "lost+found").mkdir(parents=True)
    root.symlink_to(disk)


def leave_a_file(root: Path) -> None:
    remove(root)
    root.write_text("")


def leave_what_a_crash_left(root: Path) -> None:
    empty(root)
    (root / ".step-000040.0123456789ab.incomplete").mkdir()
    (root / "latest").write_text("step-000030\n")


LOSSES = (remove, empty, move, unmount, mount_another_disk, leave_a_file, leave_what_a_crash_left)


@pytest.mark.parametrize("lose", LOSSES)
def test_a_run_whose_checkpoints_are_gone_is_refused_and_told_what_to_do(folder, lose):
    lose(folder.checkpoints)
    with pytest.raises(UserError, match=r"checkpoints' .* step 30 .* on 20.*--resume PATH.*--resume none"):
        choose(folder, "auto", RECIPE, LAYOUT)
    with pytest.raises(UserError, match="step 30"):
        choose(RunFolder(folder.path.with_name("mine")), str(folder.path), RECIPE, LAYOUT)


def test_a_run_folder_that_was_moved_or_copied_is_known_by_its_names_alone(folder):
    copy = RunFolder(shutil.copytree(folder.path, folder.path.with_name("copy")))
    shutil.rmtree(folder.path)
    found = choose(copy, "auto", RECIPE, LAYOUT)
    assert found is not None and found.step == NEWEST
    remove(copy.checkpoints)
    with pytest.raises(UserError, match="copy/checkpoints' is not there"):
        choose(copy, "auto", RECIPE, LAYOUT)


def by_metrics(folder: RunFolder) -> None:
    with open(folder.metrics_file, "a") as file:
        file.write(json.dumps({"step": NEWEST, "kind": "checkpoint", "speed/checkpoint_seconds": 1.0}) + "\n")


def by_state(folder: RunFolder) -> None:
    folder.write_state("preempted", step=NEWEST)


@pytest.mark.parametrize("known", [by_metrics, by_state])
def test_a_run_of_an_earlier_version_is_known_by_its_metrics_and_its_state(
    folder, known: Callable[[RunFolder], None]
):
    folder.last_checkpoint_file.unlink()
    known(folder)
    remove(folder.checkpoints)
    with pytest.raises(UserError, match="step 30 .*--resume none"):
        choose(folder, "auto", RECIPE, LAYOUT)


def test_damaged_states_and_metrics_of_earlier_versions_hinder_no_resume(folder):
    folder.last_checkpoint_file.unlink()
    folder.state_file.write_text("")
    with open(folder.metrics_file, "ab") as file:
        file.write(b'\xff\xfe{"step": 31, "kind": "checkpoint", \n{"step": 4')
    found = taken(folder, "auto")
    assert found is not None and found.step == NEWEST


def test_where_the_newest_vanished_the_one_before_is_taken_with_a_warning(folder, capsys):
    remove(folder.checkpoints / "step-000030")
    found = taken(folder, "auto")
    assert found is not None and found.step == 20
    printed = capsys.readouterr().out
    assert (
        "WARNING" in printed and "step-000030', written on 20" in printed and "after 20 are lost" in printed
    )


def test_a_commit_that_a_crash_cut_before_its_record_is_taken_all_the_same(folder, capsys):
    checkpoint(folder.checkpoints / "step-000040", 40)
    found = taken(folder, "auto")
    assert found is not None and found.step == 40
    assert "WARNING" not in capsys.readouterr().out


def test_the_metrics_that_are_written_again_are_kept_aside(folder):
    before = folder.metrics_file.read_text().splitlines()
    remove(folder.checkpoints / "step-000030")
    taken(folder, "auto")
    assert (folder.path / "replaced-1" / "metrics.jsonl").read_text().splitlines() == before[20:]


def test_a_run_killed_before_its_first_checkpoint_starts_again_by_itself_and_its_metrics_are_kept(
    folder, capsys
):
    empty(folder.checkpoints)
    folder.last_checkpoint_file.unlink()
    before = folder.metrics_file.read_text()
    folder.write_state("running", step=0)
    assert taken(folder, "auto") is None
    assert "no checkpoint yet: training starts from step 0" in capsys.readouterr().out
    assert (folder.path / "replaced-1" / "metrics.jsonl").read_text() == before


def test_a_first_start_says_nothing_of_checkpoints(tmp_path, capsys):
    assert taken(RunFolder(tmp_path), "auto") is None
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_begun_anew_a_run_owes_nothing_to_the_lost_checkpoints(folder):
    remove(folder.checkpoints)
    folder.metrics_file.unlink()
    assert taken(folder, "none") is None
    assert record.read(folder) is None
    assert taken(folder, "auto") is None


def test_a_start_begins_anew_without_a_checkpoint_or_with_one_of_another_run(folder, tmp_path):
    own = (str(folder.path), str(folder.checkpoints / "step-000010"))
    assert [begins_anew(folder, option) for option in ("auto", *own)] == [False] * 3
    disk = tmp_path / "disk"
    folder.checkpoints.rename(disk)
    folder.checkpoints.symlink_to(disk)
    assert not begins_anew(folder, str(disk / "step-000010"))
    foreign = (str(tmp_path / "other"), str(tmp_path / "other" / "checkpoints" / "step-000010"))
    assert [begins_anew(folder, option) for option in ("none", *foreign)] == [True] * 3


def test_what_is_said_of_an_unmounted_disk_can_be_done(folder):
    unmount(folder.checkpoints)
    with pytest.raises(UserError, match="or begin anew with --resume none"):
        choose(folder, "auto", RECIPE, LAYOUT)
    folder.check_writable(begins_anew=begins_anew(folder, "none"))
    assert taken(folder, "none") is None
    assert not folder.checkpoints.is_symlink()


def test_a_run_that_went_on_from_anothers_checkpoint_does_not_begin_at_step_0(folder, tmp_path):
    mine = RunFolder(tmp_path / "mine")
    mine.path.mkdir()
    mine.lock.write_heartbeat()
    others = folder.checkpoints / "step-000020"
    record.write(mine, others, 20)
    with pytest.raises(UserError, match=f"no checkpoint of its own: .*--resume {others}"):
        choose(mine, "auto", RECIPE, LAYOUT)
    checkpoint(mine.checkpoints / "step-000025", 25)
    found = choose(mine, "auto", RECIPE, LAYOUT)
    assert found is not None and found.step == 25


@pytest.mark.parametrize(
    "content",
    [
        *('{"step": ', "", "[]", "null", '{"step": "x", "path": "y", "time": 0}'),
        *('{"step": 30, "path": "y", "time": "noon"}', '{"step": 30, "path": "y", "time": 1e30}'),
    ],
)
def test_a_damaged_record_is_named(folder, content):
    folder.last_checkpoint_file.write_text(content)
    with pytest.raises(UserError, match=r"last_checkpoint.json: damaged; remove it"):
        choose(folder, "auto", RECIPE, LAYOUT)


def test_a_run_that_lost_its_folder_records_nothing(folder):
    before = folder.last_checkpoint_file.read_text()
    RunFolder(folder.path).lock.write_heartbeat()
    with pytest.raises(FencedError):
        record.write(folder, folder.checkpoints / "step-000010", 10)
    assert folder.last_checkpoint_file.read_text() == before
    assert steps_in(folder) == [10, 20, 30]
