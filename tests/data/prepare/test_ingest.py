"""Ingestion can be interrupted at any moment: what is finished is kept, and nothing of it is lost or wrong."""

from __future__ import annotations

import fcntl
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bico_ds.common.errors import UserError
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.ingest import IngestFailure, ingest
from bico_ds.data.prepare.shards import plan_shards
from tests import ROOT
from tests.data.prepare.ingesting import TEXTS, all_documents, contents, ingest_files, write_jsonl


def test_a_bad_line_stops_and_the_repaired_file_is_read_anew(tmp_path: Path, bpe_tokenizer: str) -> None:
    records: list[Any] = [{"text": t} for t in TEXTS]
    file = write_jsonl(tmp_path / "a.jsonl", [*records[:50], 7, *records[50:]])
    with pytest.raises(UserError, match=r"a\.jsonl:51: broken JSON"):
        ingest_files(file, bpe_tokenizer, tmp_path / "s", shard_bytes=500)
    assert not (tmp_path / "s").exists()
    ingest_files(write_jsonl(file, records), bpe_tokenizer, tmp_path / "s", shard_bytes=500)
    assert len(all_documents(tmp_path / "s")) == 60


def test_finished_shards_of_files_that_did_not_change_are_kept(tmp_path: Path, bpe_tokenizer: str) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "fine"}, {}])
    with pytest.raises(UserError, match=r"b\.jsonl:2: missing field"):
        ingest_files(
            [first, second, tmp_path / "." / "a.jsonl"], bpe_tokenizer, tmp_path / "s", shard_bytes=900
        )
    parts = {part: part.stat().st_ino for part in tmp_path.glob(".s.preparing/part-*")}
    assert len(parts) > 3
    write_jsonl(second, [{"text": "repaired"}, {}])
    with pytest.raises(UserError, match=r"b\.jsonl:2: missing field"):
        ingest_files([first, second], bpe_tokenizer, tmp_path / "s", shard_bytes=900)
    assert {part: part.stat().st_ino for part in tmp_path.glob(".s.preparing/part-*")} == parts
    write_jsonl(second, [{"text": "repaired"}])
    ingest_files([first, second], bpe_tokenizer, tmp_path / "s", shard_bytes=900)
    assert len(all_documents(tmp_path / "s")) == 61


def test_a_finished_shard_that_was_damaged_meanwhile_is_made_again(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    """Every file of it: the texts' digests decide which documents are duplicates."""
    records: list[Any] = [{"text": t} for t in [*TEXTS, TEXTS[3]]]
    file, bad = write_jsonl(tmp_path / "a.jsonl", records), write_jsonl(tmp_path / "b.jsonl", [{}])
    ingest_files([file], bpe_tokenizer, tmp_path / "alone", deduplicate=True)
    names = ["digests.bin", "result.json", "tokens.bin", "manifest.json", "groups.bin"]
    for name in names:
        write_jsonl(bad, [{}])
        with pytest.raises(UserError, match="missing field"):
            ingest_files([file, bad], bpe_tokenizer, tmp_path / name, deduplicate=True)
        (part,) = tmp_path.glob(f".{name}.preparing/part-*")
        content = bytearray((part / name).read_bytes())
        content[len(content) // 2] ^= 1
        (part / name).write_bytes(content)
        write_jsonl(bad, [])
        ingest_files([file, bad], bpe_tokenizer, tmp_path / name, deduplicate=True)
        assert contents(tmp_path / name) == contents(tmp_path / "alone")


def test_no_shard_is_kept_from_before_the_chat_template_changed(tmp_path: Path, bpe_tokenizer: str) -> None:
    shutil.copytree(bpe_tokenizer, tmp_path / "t")
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    files = [write_jsonl(tmp_path / "a.jsonl", [chat]), write_jsonl(tmp_path / "b.jsonl", [{}])]
    with pytest.raises(UserError, match="missing field"):
        ingest_files(files, str(tmp_path / "t"), tmp_path / "s", messages_field="messages")
    template = tmp_path / "t" / "chat_template.jinja"
    template.write_text(template.read_text().replace("%}[{{", "%}({{"))
    write_jsonl(files[1], [chat])
    ingest_files(files, str(tmp_path / "t"), tmp_path / "s", messages_field="messages")
    first, second = all_documents(tmp_path / "s")
    assert first.token_ids.tolist() == second.token_ids.tolist()


def test_an_output_that_exists_is_kept_without_force(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    ingest_files(file, bpe_tokenizer, tmp_path / "s")
    before = contents(tmp_path / "s")
    write_jsonl(file, [{"text": "new and longer"}])
    with pytest.raises(UserError, match="--force"):
        ingest_files(file, bpe_tokenizer, tmp_path / "s")
    assert contents(tmp_path / "s") == before
    ingest_files(file, bpe_tokenizer, tmp_path / "s", force=True)
    assert contents(tmp_path / "s") != before


def test_a_full_disk_says_so_and_leaves_no_store(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS * 40])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(IngestFailure, match=r"cannot write .*GiB free.*run the same command again"):
            ingest_files(file, bpe_tokenizer, tmp_path / "s", shard_bytes=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "s").exists()
    ingest_files(file, bpe_tokenizer, tmp_path / "s", shard_bytes=20_000)
    assert len(all_documents(tmp_path / "s")) == 60 * 40


_DRIVER = """
import sys
from pathlib import Path
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.ingest import ingest
from bico_ds.data.prepare.shards import plan_shards

if __name__ == "__main__":
    file, tokenizer, output = sys.argv[1:]
    shards = plan_shards([Path(file)], text_by="line", shard_bytes=30_000)
    ingest(shards, IngestOptions(held_out=0.1), tokenizer, Path(output), processes=2)
"""


@pytest.mark.parametrize("aside", [".s.previous", ".s.replaced-4711"])  # the second: by version 0.1.0
def test_a_store_moved_aside_by_a_killed_replacement_comes_back(
    tmp_path: Path, bpe_tokenizer: str, aside: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    ingest_files(file, bpe_tokenizer, tmp_path / "s")
    before = contents(tmp_path / "s")
    (tmp_path / "s").rename(tmp_path / aside)
    with pytest.raises(UserError, match="--force"):
        ingest_files(file, bpe_tokenizer, tmp_path / "s")
    assert contents(tmp_path / "s") == before


def test_a_strangers_hidden_file_in_the_work_folder_stops_nothing(tmp_path: Path, bpe_tokenizer: str) -> None:
    """NFS leaves `.nfs…` files, editors and desktops others."""
    (tmp_path / ".s.preparing").mkdir()
    (tmp_path / ".s.preparing" / ".nfs0000a").write_text("")
    ingest_files(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), bpe_tokenizer, tmp_path / "s")
    assert (tmp_path / "s" / "manifest.json").is_file()


def test_a_second_process_says_that_it_waits(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()  # capsys loses what is written between its reading and its emptying
    monkeypatch.setattr(sys, "stderr", shown)
    shards = plan_shards(
        [write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])], text_by="line", shard_bytes=99
    )
    work = tmp_path / ".s.preparing"
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = (shards, IngestOptions(), bpe_tokenizer, tmp_path / "s")
        second = threading.Thread(target=ingest, args=arguments, kwargs={"processes": 1})
        second.start()
        deadline = time.monotonic() + 60
        while "waiting for it" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not (tmp_path / "s").exists()
    second.join()
    assert f"another process is preparing {tmp_path / 's'}: waiting for it" in shown.getvalue()
    assert len(all_documents(tmp_path / "s")) == 1


def test_a_killed_worker_is_a_failure_that_keeps_finished_shards(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} {t}"} for i in range(60) for t in TEXTS])
    of_other_tests = psutil.Process().children()

    def kill_one() -> None:
        while not list(tmp_path.glob(".s.preparing/part-*")):
            time.sleep(0.01)
        children = [child for child in psutil.Process().children() if child not in of_other_tests]
        next(child for child in children if "spawn_main" in " ".join(child.cmdline())).kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(IngestFailure, match="a tokenizing process was killed"):
        ingest_files(file, bpe_tokenizer, tmp_path / "s", shard_bytes=6_000, processes=2)
    killer.join()
    assert list(tmp_path.glob(".s.preparing/part-*"))
    assert not (tmp_path / "s").exists()


def _kill_when(
    command: list[str], environment: dict[str, str], moment: Callable[[], bool], delay: float
) -> None:
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None and not moment():
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_at_random_moments_the_next_run_gives_the_same_bytes(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    rng = random.Random(time.time_ns())
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} {t}"} for i in range(60) for t in TEXTS])
    ingest_files(file, bpe_tokenizer, tmp_path / "want", held_out=0.1)
    driver, output = tmp_path / "driver.py", tmp_path / "s"
    driver.write_text(_DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(driver), str(file), bpe_tokenizer, str(output)]

    def parts() -> int:
        return len(list(tmp_path.glob(".s.preparing/part-*")))

    enough = parts() + rng.randrange(1, 4)
    _kill_when(command, environment, lambda: parts() >= enough, rng.random() * 0.05)
    assert not output.exists()
    _kill_when(command, environment, lambda: any(tmp_path.glob(".s.*.incomplete")), rng.random() * 0.2)
    if not output.exists():
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "going on after an interrupted run" in done.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "driver.py", "s", "want"]
    assert contents(output) == contents(tmp_path / "want")
