"""Files and folders are complete at every moment, in the old state or the new one, and after any kill."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from bico_ds.common.files import (
    atomic_file,
    atomic_folder,
    checksum,
    incomplete_folder,
    overwrite,
    publish_folder,
    recover_folder,
    remove_incomplete,
    write_atomically,
)
from tests import ROOT
from tests.full_disk import files_limited_to

SIZE = 300_000
WRITES_FILES = f"""
import sys
from pathlib import Path
from bico_ds.common.files import write_atomically
while True:
    for letter in "abc":
        write_atomically(Path(sys.argv[1]), letter * {SIZE})
"""
WRITES_FOLDERS = """
import sys
from pathlib import Path
from bico_ds.common.files import atomic_folder
while True:
    for letter in "abc":
        with atomic_folder(Path(sys.argv[1]), replace=True) as folder:
            (folder / "inner").mkdir()
            (folder / "first").write_text(letter)
            (folder / "inner" / "second").write_text(letter)
"""


@contextmanager
def writing(program: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that replaces `path` again and again, has done so once, and is killed at the end of the block."""
    before = version(path)
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while version(path) in (None, before) and time.monotonic() < deadline:
            time.sleep(0.002)
        yield process
    finally:
        process.kill()
        process.wait()


def version(path: Path) -> tuple[int, int] | None:
    """Another one for each that is put there; None where nothing is."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def is_one_version(content: str) -> bool:
    return len(content) == SIZE and content == content[0] * SIZE


def fill_half_of(atomic: AbstractContextManager[Path]) -> None:
    """Write a file, or a file into a folder, and fail."""
    with atomic as temporary:
        (temporary / "weights" if temporary.is_dir() else temporary).write_text("half of it")
        raise RuntimeError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_readers_see_one_version_of_a_file_while_it_is_replaced_and_after_its_writer_is_killed(tmp_path):
    file = tmp_path / "state.json"
    for _ in range(4):
        with writing(WRITES_FILES, file):
            begun, least, seen = time.monotonic(), 0.2 + random.random() / 10, set()
            while len(seen) < 2 or time.monotonic() < begun + least:
                content = file.read_text()
                assert is_one_version(content)
                seen.add(content[0])
                assert time.monotonic() < begun + 60, "the file was replaced while we read"
        assert is_one_version(file.read_text())


def test_a_killed_writer_leaves_one_complete_folder_once_its_successor_has_tidied_up(tmp_path):
    folder = tmp_path / "export"
    for _ in range(6):
        with writing(WRITES_FOLDERS, folder):
            time.sleep(0.1 + random.random() / 10)
        recover_folder(folder)
        assert names(tmp_path) == ["export"]
        first, second = (folder / "first").read_text(), (folder / "inner" / "second").read_text()
        assert first == second in "abc"


def test_a_writer_killed_between_the_two_renames_gives_the_old_folder_back(tmp_path):
    folder = tmp_path / "store"
    with atomic_folder(folder) as temporary:
        (temporary / "tokens").write_text("old")
    (incomplete_folder(folder) / "tokens").write_text("new")
    folder.rename(tmp_path / ".store.previous")
    recover_folder(folder)
    assert (folder / "tokens").read_text() == "old"
    assert names(tmp_path) == ["store"]


def test_tidying_up_leaves_what_belongs_to_another_folder(tmp_path):
    other = incomplete_folder(tmp_path / "export.bf16")
    recover_folder(tmp_path / "export")
    assert other.is_dir()


def test_the_one_writer_in_a_folder_removes_all_that_killed_ones_left_and_nothing_else(tmp_path):
    (incomplete_folder(tmp_path / "step-000100") / "state").write_text("half")
    for name in ("step-000050", ".hidden"):
        (tmp_path / name).mkdir()
    remove_incomplete(tmp_path)
    assert names(tmp_path) == [".hidden", "step-000050"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "state.json"
    write_atomically(file, "old")
    with files_limited_to(1000), pytest.raises(OSError, match="too large"):
        write_atomically(file, "x" * 2000)
    with pytest.raises(RuntimeError):
        fill_half_of(atomic_file(file))
    assert file.read_text() == "old"
    assert names(tmp_path) == ["state.json"]


def test_a_write_into_a_folder_that_is_renamed_meanwhile_fails_and_leaves_nothing(tmp_path):
    (tmp_path / "run").mkdir()

    def write() -> None:
        with atomic_file(tmp_path / "run" / "lock.json") as temporary:
            temporary.write_text("new")
            (tmp_path / "run").rename(tmp_path / "elsewhere")

    with pytest.raises(FileNotFoundError):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_fails_leaves_the_old_one_and_nothing_beside_it(tmp_path, replace):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError):
        fill_half_of(atomic_folder(folder, replace=replace))
    assert (folder / "weights").read_text() == "old"
    assert names(tmp_path) == ["export"]


def test_of_two_that_write_the_same_folder_the_first_wins_and_the_second_is_told(tmp_path):
    folder = tmp_path / "plan"
    slow = atomic_folder(folder)
    (slow.__enter__() / "plan.json").write_text("slow")
    with atomic_folder(folder) as fast:
        (fast / "plan.json").write_text("fast")
    with pytest.raises(OSError, match="not empty"):
        slow.__exit__(None, None, None)
    assert (folder / "plan.json").read_text() == "fast"
    assert names(tmp_path) == ["plan"]


def test_a_folder_is_replaced_as_a_whole_and_an_empty_one_is_in_nobodys_way(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for replace, name in ((False, "one"), (True, "two")):
        complete = incomplete_folder(folder)
        (complete / name).write_text("")
        publish_folder(complete, folder, replace=replace)
        assert names(folder) == [name]
    assert names(tmp_path) == ["export"]


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "big_disk").mkdir()
    link = tmp_path / "export"
    link.symlink_to(tmp_path / "big_disk")
    for content in ("one", "two", "three"):
        with atomic_folder(link, replace=True) as temporary:
            (temporary / "weights").write_text(content)
        assert (tmp_path / "big_disk" / "weights").read_text() == content
    assert link.is_symlink()
    assert names(tmp_path) == ["big_disk", "export"]


def test_an_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(FileNotFoundError):
        publish_folder(tmp_path / "vanished", folder, replace=True)
    assert (folder / "weights").read_text() == "old"
    assert names(tmp_path) == ["export"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_names_serves_all_the_same(tmp_path, monkeypatch, number):
    """Some network and user-space file systems refuse fsync of a folder."""
    flush = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_atomically(tmp_path / "state.json", "new")
    with atomic_folder(tmp_path / "export") as temporary:
        (temporary / "weights").write_text("new")
    assert names(tmp_path) == ["export", "state.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_and_folders_are_as_readable_as_the_umask_lets_them(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"bytes")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_checksums_are_those_of_the_standard_library(tmp_path):
    content = random.randbytes(3_000_000)
    write_atomically(tmp_path / "file", content)
    assert checksum(tmp_path / "file", "sha256") == hashlib.sha256(content).hexdigest()
    assert checksum(tmp_path / "file", "blake2b") == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_a_file_is_overwritten_in_its_place_as_long_as_it_is_the_same_file(tmp_path):
    path = tmp_path / "state"
    path.write_text("a long content\n")
    place = path.stat().st_ino
    assert overwrite(path, "short\n", only_if=lambda old: old == b"a long content\n")
    assert path.read_text() == "short         \n"
    assert overwrite(path, "a content that is longer than before\n", only_if=lambda old: True)
    assert path.read_text() == "a content that is longer than before\n"
    assert not overwrite(path, "nothing\n", only_if=lambda old: False)

    def replaced_meanwhile(old: bytes) -> bool:
        write_atomically(path, "another's\n")
        return True

    overwrite(path, "ours\n", only_if=replaced_meanwhile)
    assert path.read_text() == "another's\n"
    assert path.stat().st_ino != place


def test_where_there_is_no_room_to_overwrite_a_file_its_old_content_stays(tmp_path):
    path = tmp_path / "state"
    path.write_text("old\n")
    with files_limited_to(10), pytest.raises(OSError, match="No space left|File too large"):
        overwrite(path, "longer than there is room\n", only_if=lambda old: True)
    assert path.read_text() == "old\n"


def test_incomplete_files_of_killed_writers_are_removed_as_folders_are(tmp_path):
    left = tmp_path / ".state.json.0123456789ab.incomplete"
    for other in (left, tmp_path / ".export.0123456789ab.incomplete", tmp_path / ".state.json.mine"):
        other.write_text("half")
    remove_incomplete(tmp_path, "state.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".export.0123456789ab.incomplete",
        ".state.json.mine",
    ]
