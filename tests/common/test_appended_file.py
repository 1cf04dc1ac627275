"""A file of records holds whole ones only, in order, and all of them once there is room again."""

from __future__ import annotations

import random
import shutil

import pytest

from bico_ds.common import appended_file
from bico_ds.common.appended_file import AppendedFile
from tests.full_disk import files_limited_to


def write(file: AppendedFile, record: bytes) -> bool:
    file.add(record)
    try:
        file.write_waiting()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_on_a_disk_that_is_full_now_and_then_no_record_is_cut_or_lost(tmp_path, monkeypatch, block):
    monkeypatch.setattr(appended_file, "_BLOCK", block)
    file, head = AppendedFile(tmp_path / "records", root=tmp_path, head=b"head\n"), b"head\n"
    records = [b"%d" % n * random.randrange(1, 40) + b"\n" for n in range(60)]
    failed = 0
    for number, record in enumerate(records, start=1):
        room = random.choice([0, 10, 30, 100, 100_000])
        size = file.path.stat().st_size if file.path.exists() else 0
        with files_limited_to(size + room):
            failed += not write(file, record)
        content = file.path.read_bytes() if file.path.exists() else b""
        assert content in (b"", head + b"".join(records[: number - file.missing]))
    file.write_waiting()
    assert failed
    assert file.missing == 0
    assert file.path.read_bytes() == head + b"".join(records)


def test_a_file_or_folder_that_was_removed_is_made_again_with_its_head(tmp_path):
    file = AppendedFile(tmp_path / "a" / "b" / "records", root=tmp_path, head=b"head\n")
    assert write(file, b"1\n")
    file.path.unlink()
    assert write(file, b"2\n")
    assert file.path.read_bytes() == b"head\n2\n"
    shutil.rmtree(tmp_path / "a")
    assert write(file, b"3\n")
    assert file.path.read_bytes() == b"head\n3\n"


def test_a_root_that_is_gone_does_not_come_back_and_what_waits_is_written_when_it_does(tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    file = AppendedFile(root / "a" / "records", root=root)
    root.rename(tmp_path / "renamed")
    assert not write(file, b"1\n")
    assert not root.exists()
    (tmp_path / "renamed").rename(root)
    assert write(file, b"2\n")
    assert file.path.read_bytes() == b"1\n2\n"


def test_more_records_than_may_wait_cost_the_oldest_and_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(appended_file, "MOST_KEPT", 3)
    file = AppendedFile(tmp_path / "records", root=tmp_path)
    (tmp_path / "records").mkdir()
    for number in range(5):
        assert not write(file, b"%d\n" % number)
    assert file.missing == 5
    (tmp_path / "records").rmdir()
    file.write_waiting()
    assert file.path.read_bytes() == b"2\n3\n4\n"
    assert file.missing == 2
