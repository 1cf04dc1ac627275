"""One writer per run folder, and no clock but the file system's decides who is alive. Real processes hold the locks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bico_ds.common.errors import UserError
from bico_ds.runtime import lock, run_folder
from bico_ds.runtime.lock import FencedError, living_locks, read_lock
from bico_ds.runtime.run_folder import RunFolder, read_state
from tests import ROOT
from tests.full_disk import room_for_no_new_file
from tests.waiting import waited

HEARTBEAT = 0.2
# Holds the lock of argv[1] as another machine would, its clock argv[2] seconds from ours; with a third argument the
# times of its files too, as on file systems that take them from the machine that writes.
HOLDER = f"""
import os, socket, sys, time
from pathlib import Path
from bico_ds.runtime import lock, run_folder
path, skew, stamps = Path(sys.argv[1]), float(sys.argv[2]), len(sys.argv) > 3
socket.gethostname = lambda: "another-machine"
os.umask(0o022)  # others may read what it writes, whatever the umask of these tests
right_time = time.time
time.time = lambda: right_time() + skew
lock.HEARTBEAT_SECONDS, lock.SETTLE_SECONDS = {HEARTBEAT}, 0.05
path.parent.mkdir(parents=True)
if stamps:
    write = lock.write_atomically
    def write_with_our_time(file, content):
        write(file.with_name("stamped"), content)
        os.utime(file.with_name("stamped"), (time.time(), time.time()))
        file.with_name("stamped").replace(file)
    lock.write_atomically = write_with_our_time
lock.RunLock(path).take()
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick_heartbeats(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", HEARTBEAT)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 6 * HEARTBEAT)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def _no_heartbeats(monkeypatch):
    """For what is known without one: none comes between a test's own changes of a lock."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 600.0)


@pytest.fixture
def _long_silence(monkeypatch):
    """So long that whoever waits for its end is not taken for one who is done at once, on a busy machine either."""
    monkeypatch.setattr(lock, "SILENT_SECONDS", 60.0)


@contextmanager
def patience() -> Iterator[None]:
    """A watch lasts as long as a busy machine may need for a heartbeat; it ends with the first one, as ever."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(lock, "HEARTBEAT_SECONDS", 20 * HEARTBEAT)
        yield


@contextmanager
def held(path: Path, *, skew: float = 0.0, stamps: bool = False) -> Iterator[subprocess.Popen[str]]:
    """The lock at `path`, held by a process that counts as one of another machine."""
    command = [sys.executable, "-c", HOLDER, str(path), str(skew), *(["stamps"] if stamps else [])]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "taken\n"
            yield process
        finally:
            process.kill()


def write_lock(folder: RunFolder, *, pid: int, host: str | None = None, heartbeat: float = 0.0) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    content = {
        "run_id": "other",
        "host": host or socket.gethostname(),
        "pid": pid,
        "job": "",
        "heartbeat": heartbeat,
    }
    folder.lock.path.write_text(json.dumps(content))


def seconds_of(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


@pytest.mark.usefixtures("_long_silence")
def test_a_second_run_in_a_living_runs_folder_is_refused(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open()
    with pytest.raises(UserError, match=f"in use by run {first.lock.run_id}"):
        second.open()
    first.lock.check()
    first.close()
    second.open()
    second.close()
    assert not second.lock.path.exists()


@pytest.mark.usefixtures("_long_silence")
def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path):
    folder = RunFolder(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_lock(folder, pid=dead.pid)
    assert living_locks([folder.lock.path]) == {}
    assert seconds_of(folder.open) < lock.SILENT_SECONDS
    folder.close()


@pytest.mark.usefixtures("_long_silence")
def test_an_earlier_start_of_the_same_slurm_job_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.lock.path.parent.mkdir(exist_ok=True)
    first.lock.write_heartbeat()
    assert seconds_of(second.open) < lock.SILENT_SECONDS
    second.close()


# With ids: workers that collect at different times must find the same names.
@pytest.mark.parametrize(
    "clock", [0.0, time.time(), time.time() + 3600], ids=["the epoch", "now", "an hour ahead"]
)
def test_the_lock_of_a_silent_machine_is_taken_over_after_a_watch_whatever_its_clock_shows(tmp_path, clock):
    folder = RunFolder(tmp_path)
    write_lock(folder, pid=os.getpid(), host="a-machine-that-is-gone", heartbeat=clock)
    assert seconds_of(folder.open) >= 6 * HEARTBEAT
    found = read_lock(folder.lock.path)
    assert found is not None
    assert found.run_id == folder.lock.run_id
    folder.close()


def test_an_older_writer_is_fenced_off_and_told(tmp_path):
    old, new = RunFolder(tmp_path), RunFolder(tmp_path)
    lost: list[bool] = []
    old.open()
    old.lock.on_lost = lambda: lost.append(True)
    new.lock.write_heartbeat()  # as if the old one had been cut off, and watched in silence
    with pytest.raises(FencedError, match="lost the folder"):
        old.write_state("running", step=1)
    waited(lambda: lost, pause=HEARTBEAT / 10)
    old.close()
    new.lock.check()


@pytest.mark.parametrize("skew", [-3600.0, 0.0, 3600.0])
def test_a_holder_is_alive_at_once_and_dead_soon_after_its_end_whatever_its_clock_shows(
    tmp_path, monkeypatch, skew
):
    path, silent = tmp_path / "run" / "lock.json", lock.SILENT_SECONDS
    watched: list[int] = []
    with held(path, skew=skew):
        monkeypatch.setattr(lock, "SILENT_SECONDS", 60.0)  # no busy machine's heartbeat is so late
        assert abs(read_lock(path).heartbeat - time.time() - skew) < 60  # type: ignore[union-attr]
        assert list(living_locks([path], on_watch=lambda count, seconds: watched.append(count))) == [path]
        assert not watched
        with pytest.raises(UserError, match="in use by run .* on another-machine"):
            RunFolder(path.parent).open()
    monkeypatch.setattr(lock, "SILENT_SECONDS", silent)
    time.sleep(7 * HEARTBEAT)
    assert living_locks([path]) == {}


@pytest.mark.parametrize("skew", [-100.0, 100.0, 3600.0])
def test_where_machines_stamp_their_own_files_a_living_holder_is_seen_by_its_heartbeat(tmp_path, skew):
    path = tmp_path / "run" / "lock.json"
    with held(path, skew=skew, stamps=True), patience():
        assert abs(path.stat().st_mtime - time.time() - skew) < 60
        assert list(living_locks([path])) == [path]
    assert living_locks([path]) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_in_a_folder_that_only_others_may_write_a_living_holder_is_seen_by_its_heartbeat():
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "run" / "lock.json"
        with held(path), patience():
            os.chmod(root, 0o755)
            os.seteuid(65534)
            try:
                with pytest.raises(PermissionError):
                    (path.parent / "file").touch()
                assert list(living_locks([path])) == [path]
            finally:
                os.seteuid(0)


def test_many_locks_in_doubt_are_watched_together_and_old_ones_not_at_all(tmp_path):
    def lay(name: str, age: float) -> Path:
        folder = RunFolder(tmp_path / name)
        write_lock(folder, pid=1, host="a-machine-that-is-gone", heartbeat=time.time())
        os.utime(folder.lock.path, (time.time() - age,) * 2)
        return folder.lock.path

    old = [lay(f"old-{n}", 2 * lock.SKEW_SECONDS) for n in range(50)]
    doubtful = [lay(f"doubtful-{n}", 100.0) for n in range(50)]
    watched: list[tuple[int, float]] = []
    note = lambda count, seconds: watched.append((count, seconds))  # noqa: E731
    asked = [*old, *doubtful, tmp_path / "none" / "lock.json"]
    assert seconds_of(lambda: living_locks(asked, on_watch=note)) < 50 * HEARTBEAT, "one after another"
    assert living_locks(asked, on_watch=note) == {}
    assert watched == [(50, 1.5 * HEARTBEAT)] * 2
    assert living_locks(old, on_watch=note) == {}
    assert len(watched) == 2, "what is known at once is not watched"


def running(path: Path) -> RunFolder:
    """A run that has begun, and calls what it was told when it lost the folder."""
    folder = RunFolder(path)
    folder.open()
    folder.write_state("running", step=3)
    folder.recipe_file.write_text("of this run")
    return folder


def lost(folder: RunFolder) -> str:
    """What a run that lost its folder says; it records its failure and gives the folder back, as a start does."""
    with pytest.raises(FencedError) as error:
        folder.lock.check()
    with pytest.raises(FencedError):
        folder.fail(str(error.value))
    folder.close()
    return str(error.value)


@pytest.mark.usefixtures("_no_heartbeats")
def test_a_lost_lock_says_whose_the_folder_is_and_no_state_stays_at_running(tmp_path):
    old = running(tmp_path)
    content = json.loads(old.lock.path.read_text())
    content |= {"run_id": "theirs", "host": "node-7", "pid": 4321, "job": "99"}
    old.lock.path.write_text(json.dumps(content))
    assert "lost the folder to run theirs (process 4321 on node-7, job 99)" in lost(old)
    state = read_state(old.state_file)
    assert (state["state"], state["run_id"]) == ("failed", old.lock.run_id)  # type: ignore[index]
    assert "node-7" in state["reason"]  # type: ignore[index]
    assert read_lock(old.lock.path).run_id == "theirs"  # type: ignore[union-attr]


@pytest.mark.usefixtures("_no_heartbeats")
def test_the_state_of_the_run_that_took_the_folder_over_is_left_alone(tmp_path):
    old, new = running(tmp_path), RunFolder(tmp_path)
    new.lock.write_heartbeat()
    new.write_state("running", step=4)
    before = new.state_file.read_bytes()
    assert f"lost the folder to run {new.lock.run_id}" in lost(old)
    assert new.state_file.read_bytes() == before
    new.lock.check()


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda path: path.write_text("{")], ids=["removed", "damaged"]
)
def test_a_lock_file_that_nobody_else_took_is_written_again(tmp_path, spoil):
    folder, told = running(tmp_path), []
    folder.lock.on_lost = lambda: told.append(True)
    spoil(folder.lock.path)
    folder.lock.check()
    spoil(folder.lock.path)
    waited(lambda: read_lock(folder.lock.path), pause=HEARTBEAT / 10)  # by its heartbeat, too
    assert read_lock(folder.lock.path).run_id == folder.lock.run_id  # type: ignore[union-attr]
    assert not told
    folder.close()
    assert not folder.lock.path.exists()


@pytest.mark.usefixtures("_no_heartbeats")
def test_a_lock_that_is_gone_after_another_run_was_there_is_not_taken_again(tmp_path):
    """This one was cut off, the other took the folder over, ended, and gave the lock back."""
    old, new = running(tmp_path), RunFolder(tmp_path)
    new.lock.write_heartbeat()
    new.write_state("done", step=9)
    new.lock.path.unlink()
    assert "was removed, and the state there is not this run's" in lost(old)
    assert read_state(old.state_file)["state"] == "done"  # type: ignore[index]


@pytest.mark.parametrize("begun_anew", [False, True])
def test_a_run_whose_folder_was_renamed_names_the_new_one_and_ends_there(tmp_path, begun_anew):
    old = running(tmp_path / "run")
    lost_by: list[str] = []
    old.lock.on_lost = lambda: lost_by.append(old.lock.loss())
    renamed = RunFolder(old.path.rename(tmp_path / "a new name"))
    waited(lambda: lost_by, pause=HEARTBEAT / 10)
    if begun_anew:  # when the old one writes no more heartbeats
        new = running(tmp_path / "run")
        lost_by.clear()
        waited(lambda: lost_by, pause=HEARTBEAT / 10)
    assert f"was renamed to '{renamed.path}'" in lost_by[0]
    assert f"--output-dir '{renamed.path}'" in lost(old)
    assert read_state(renamed.state_file)["state"] == "failed"  # type: ignore[index]
    assert not renamed.lock.path.exists()
    assert old.path.exists() == begun_anew
    if begun_anew:
        assert read_state(new.state_file)["state"] == "running"  # type: ignore[index]
        new.lock.check()
        new.close()


def test_a_run_whose_folder_was_removed_says_so_and_does_not_bring_it_back(tmp_path):
    folder = running(tmp_path / "run")
    shutil.rmtree(folder.path)
    assert f"'{folder.path}' was removed" in lost(folder)
    assert not folder.path.exists()


def test_on_a_full_disk_the_lock_keeps_beating_and_the_last_state_is_written():
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = running(Path(root) / "run")
        with room_for_no_new_file(folder.path):
            with pytest.raises(PermissionError):
                (folder.path / "file").touch()
            before = read_lock(folder.lock.path)
            waited(lambda: read_lock(folder.lock.path) not in (None, before), pause=HEARTBEAT / 10)
            for state in ("preempted", "done"):
                folder.write_state(state, step=9)
                assert read_state(folder.state_file)["state"] == state  # type: ignore[index]
            folder.fail("a reason that is longer than there was room for in the old state " * 20)
            assert read_state(folder.state_file)["state"] == "failed"  # type: ignore[index]
        folder.close()


def test_on_a_full_disk_the_state_of_an_earlier_run_is_not_overwritten(monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE_SECONDS", 0.1)
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        earlier = running(Path(root) / "run")
        earlier.write_state("done", step=9)
        earlier.close()
        folder = RunFolder(earlier.path)
        folder.open()
        before = folder.state_file.read_bytes()
        with room_for_no_new_file(folder.path), pytest.raises(PermissionError):
            folder.write_state("running", step=0)
        assert folder.state_file.read_bytes() == before
        folder.close()


def test_a_start_removes_what_killed_writers_left_and_nothing_else(tmp_path):
    folder = running(tmp_path)
    left = [
        ".state.json.0123456789ab.incomplete", ".state.json.4711", ".recipe.yaml.4711.140001",
        "evaluation/.step-000002.json.0123456789ab.incomplete", "logs/.spike.json.0123456789ab.incomplete",
        "checkpoints/.step-000002.0123456789ab.incomplete", "checkpoints/.latest.0123456789ab.incomplete",
    ]  # fmt: skip
    others = [".export.0123456789ab.incomplete", ".mine", "logs/.mine", "evaluation/step-000002.json"]
    for name in (*left, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    folder.remove_incomplete()
    assert not [name for name in left if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in others)
    folder.close()
