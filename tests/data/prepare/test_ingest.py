"""Ingestion: the same documents from every kind of file, whatever the shards, processes and interruptions."""

from __future__ import annotations

import fcntl
import gzip
import json
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

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from bico_ds.common.errors import UserError
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.ingest import IngestFailure, ingest
from bico_ds.data.prepare.input_files import find_files
from bico_ds.data.prepare.report import IngestReport
from bico_ds.data.prepare.shards import hub_shards, plan_shards
from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import load_tokenizer
from tests import ROOT

TEXTS = [f"Number {i}: naïve café 北京 🙂, \t'quoted' {'word ' * (i % 17)}end." for i in range(60)]


def _write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _ingest(
    inputs: Path | list[Path], tokenizer: str, output: Path, *, shard_bytes: int = 1 << 20, **settings: Any
) -> IngestReport:
    force, processes = settings.pop("force", False), settings.pop("processes", 1)
    options = IngestOptions(**settings)
    files = find_files([str(path) for path in (inputs if isinstance(inputs, list) else [inputs])])
    shards = plan_shards(files, text_by=options.text_by, shard_bytes=shard_bytes)
    return ingest(shards, options, tokenizer, output, force=force, processes=processes, progress=False)


def _bytes(store: Path) -> dict[str, bytes]:
    return {str(f.relative_to(store)): f.read_bytes() for f in sorted(store.rglob("*")) if f.is_file()}


def _all(store: Path):
    opened = TokenStore.open(store, verify="checksums")
    return opened.whole(np.arange(len(opened)))


def test_documents_are_what_transformers_tokenizes_between_bos_and_eos(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    _ingest(_write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS]), bpe_tokenizer, tmp_path / "s")
    tokenizer = load_tokenizer(bpe_tokenizer)
    for document, text in zip(_all(tmp_path / "s"), TEXTS, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert document.token_ids.tolist() == [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def test_every_kind_of_file_gives_the_same_store(tmp_path: Path, bpe_tokenizer: str) -> None:
    lines = "".join(json.dumps({"text": t, "more": 1}) + "\n" for t in TEXTS).encode()
    half = len(b"".join(lines.splitlines(keepends=True)[:30]))
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "a.jsonl").write_bytes(lines[:half])
    (tmp_path / "folder" / "deep" / "b.json").write_bytes(b"\n" + lines[half:].rstrip())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    )
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=7)
    _ingest(tmp_path / "folder", bpe_tokenizer, tmp_path / "want", shard_bytes=100)
    for file in ("a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"):
        _ingest(tmp_path / file, bpe_tokenizer, tmp_path / f"{file}.store", shard_bytes=500)
        assert _bytes(tmp_path / f"{file}.store") == _bytes(tmp_path / "want"), file


def test_a_hub_data_set_gives_the_same_store(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    file = _write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": t} for t in TEXTS])
    shards = hub_shards(str(tmp_path / "set"), config=None, split="train")
    ingest(shards, IngestOptions(), bpe_tokenizer, tmp_path / "hub", processes=1, progress=False)
    _ingest(file, bpe_tokenizer, tmp_path / "want")
    assert _bytes(tmp_path / "hub") == _bytes(tmp_path / "want")
    with pytest.raises(UserError, match="cannot load"):
        hub_shards(str(tmp_path / "set"), config=None, split="absent")


@pytest.mark.parametrize(
    ("split", "want"),
    [
        ("train[:10]", TEXTS[:10]),
        ("train[50%:]", TEXTS[30:]),
        ("train[25:35]", TEXTS[25:35]),
        ("train[-5:]+train[:5]", TEXTS[-5:] + TEXTS[:5]),
        ("test+train[:1]", ["a test", TEXTS[0]]),
        ("all", [*TEXTS, "a test"]),
    ],
)
def test_a_slice_of_a_hub_split_gives_the_rows_that_it_names(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch, split: str, want: list[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("bico_ds.data.prepare.shards._RECORDS_PER_SHARD", 8)
    (tmp_path / "set").mkdir()
    _write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": t} for t in TEXTS])
    _write_jsonl(tmp_path / "set" / "test.jsonl", [{"text": "a test"}])
    shards = hub_shards(str(tmp_path / "set"), config=None, split=split)
    ingest(shards, IngestOptions(), bpe_tokenizer, tmp_path / "hub", processes=1, progress=False)
    decode = load_tokenizer(bpe_tokenizer).decode
    assert [decode(d.token_ids, skip_special_tokens=True) for d in _all(tmp_path / "hub")] == want


def test_a_text_file_can_be_one_document(tmp_path: Path, bpe_tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("first line\nsecond line\n")
    _ingest(tmp_path / "a.txt", bpe_tokenizer, tmp_path / "s", text_by="file", add_bos=False, add_eos=False)
    (document,) = _all(tmp_path / "s")
    assert load_tokenizer(bpe_tokenizer).decode(document.token_ids) == "first line\nsecond line\n"


@pytest.mark.parametrize("text_by", ["line", "file"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, bpe_tokenizer: str, text_by: str) -> None:
    for name, mark in (("marked", b"\xef\xbb\xbf"), ("plain", b"")):
        (tmp_path / f"{name}.txt").write_bytes(mark + "first\nsecond \ufeff\n".encode())
        _ingest(tmp_path / f"{name}.txt", bpe_tokenizer, tmp_path / name, text_by=text_by)
    assert _bytes(tmp_path / "marked") == _bytes(tmp_path / "plain")


def test_blank_lines_of_a_text_are_no_documents(tmp_path: Path, bpe_tokenizer: str) -> None:
    blank = ["", " \t", "\u00a0", "\u2003 \u00a0", "\u3000"]
    (tmp_path / "a.txt").write_bytes(("\ufeff\n" + "one\r\n".join(line + "\n" for line in blank)).encode())
    report = _ingest(tmp_path / "a.txt", bpe_tokenizer, tmp_path / "s")
    assert (len(report.lengths), report.skipped) == (len(blank) - 1, {})


def test_the_prompt_ends_where_the_completion_begins(tmp_path: Path, bpe_tokenizer: str) -> None:
    rng = random.Random(5)
    cuts = [rng.randrange(0, len(text) - 1) for text in TEXTS]
    rows = [
        {"q": t[:c], "a": t[c:], "who": f"person {i % 3}"}
        for i, (t, c) in enumerate(zip(TEXTS, cuts, strict=True))
    ]
    file = _write_jsonl(tmp_path / "a.jsonl", rows)
    _ingest(file, bpe_tokenizer, tmp_path / "s", prompt_field="q", completion_field="a", group_field="who")
    tokenizer = load_tokenizer(bpe_tokenizer)
    documents = list(_all(tmp_path / "s"))
    for document, text, cut in zip(documents, TEXTS, cuts, strict=True):
        assert tokenizer.decode(document.token_ids, skip_special_tokens=True) == text
        if cut == 0:
            assert document.prompt_length == 0
            continue
        prompt, longer = (document.token_ids[1 : document.prompt_length + extra] for extra in (0, 1))
        assert text[:cut].startswith(tokenizer.decode(prompt).rstrip("�"))
        assert len(tokenizer.decode(prompt).rstrip("�")) <= cut < len(tokenizer.decode(longer)) + 1
    assert [d.group for d in documents[:3]] == [d.group for d in documents[3:6]]
    assert len({d.group for d in documents}) == 3


def test_entities_become_the_tokens_that_touch_them(tmp_path: Path, bpe_tokenizer: str) -> None:
    text = "The café of Ana María Ruiz opened in 北京."
    spans = [[12, 26], [4, 8], [37, 39]]
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": text, "spans": spans}, {"text": "none", "spans": []}])
    _ingest(file, bpe_tokenizer, tmp_path / "s", entities_field="spans")
    first, second = _all(tmp_path / "s")
    decode = load_tokenizer(bpe_tokenizer).decode
    assert [decode(first.token_ids[a:b]).strip() for a, b in first.entity_spans] == [
        "Ana María Ruiz",
        "café",
        "北京",
    ]
    assert len(second.entity_spans) == 0


def test_words_start_after_white_space(tmp_path: Path, bpe_tokenizer: str, word_tokenizer: str) -> None:
    text = "Ünbelievable  words,\nand more"
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    _ingest(file, bpe_tokenizer, tmp_path / "s", add_bos=False, add_eos=False)
    (document,) = _all(tmp_path / "s")
    words = np.split(document.token_ids, np.flatnonzero(document.word_starts)[1:])
    decoded = [load_tokenizer(bpe_tokenizer).decode(word) for word in words]
    assert [word.strip() for word in decoded if word.strip()] == text.split()
    _ingest(_write_jsonl(tmp_path / "b.jsonl", [{"text": "today | so | ."}]), word_tokenizer, tmp_path / "w")
    assert _all(tmp_path / "w").word_starts.all()


def test_messages_are_rendered_once_and_the_last_reply_is_the_completion(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who?"), ("assistant", "Me.")]
    chats = [[{"role": r, "content": c} for r, c in turns[:n]] for n in (4, 3)]
    file = _write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    _ingest(file, bpe_tokenizer, tmp_path / "s", messages_field="messages")
    decode = load_tokenizer(bpe_tokenizer).decode
    whole, open_end = _all(tmp_path / "s")
    assert decode(whole.token_ids).startswith("<s>[user] Hi</s>[assistant]")  # one BOS, not two
    assert decode(whole.token_ids[whole.prompt_length :]).strip() == "Me.</s>"
    assert open_end.prompt_length == len(open_end.token_ids)  # no reply: nothing to learn from
    report = (tmp_path / "s" / "report.txt").read_text()
    assert "prompts      2 of 2 documents have one\nno reply     1 documents" in report


def test_a_template_that_ends_with_eos_and_a_line_end_gets_no_second_eos(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    shutil.copytree(bpe_tokenizer, tmp_path / "t")
    template = (
        "{% for m in messages %}{{ m.content }}{{ eos_token if loop.last and m.role == 'assistant' }}\n"
    )
    (tmp_path / "t" / "chat_template.jinja").write_text(template + "{% endfor %}")
    chats = [[("user", "Hi"), ("assistant", "Me.")], [("user", "Hi"), ("user", "Me.")]]
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
    _ingest(
        _write_jsonl(tmp_path / "a.jsonl", rows),
        str(tmp_path / "t"),
        tmp_path / "s",
        messages_field="messages",
    )
    tokenizer = load_tokenizer(bpe_tokenizer)
    texts = [tokenizer.decode(document.token_ids) for document in _all(tmp_path / "s")]
    assert texts == ["<s>Hi\nMe.</s>\n", "<s>Hi\nMe.\n</s>"]


def test_shards_and_processes_change_no_byte(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    settings: dict[str, Any] = {"deduplicate": True, "held_out": 0.2}
    _ingest(file, bpe_tokenizer, tmp_path / "one", **settings)
    _ingest(file, bpe_tokenizer, tmp_path / "many", shard_bytes=700, processes=2, **settings)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "many")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_duplicates_go_and_groups_are_never_torn_by_the_held_out_split(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    rows = [{"text": text, "who": i % 12} for i, text in enumerate(TEXTS)]
    file = _write_jsonl(tmp_path / "a.jsonl", rows + rows[:10])
    report = _ingest(
        file,
        bpe_tokenizer,
        tmp_path / "s",
        group_field="who",
        deduplicate=True,
        held_out=0.3,
        shard_bytes=400,
    )
    train, held_out = (set(TokenStore.open(tmp_path / p).groups.tolist()) for p in ("s", "s/held_out"))
    assert report.duplicates == 10
    assert len(report.lengths) + len(report.held_out_lengths) == 60
    assert train | held_out == set(range(12))
    assert train.isdisjoint(held_out)


def test_the_held_out_share_is_chosen_by_text_and_seed_and_nothing_else(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    texts = [f"document {i}" for i in range(1500)]
    decode = load_tokenizer(bpe_tokenizer).decode

    def held_out(name: str, rows: list[str], seed: int = 1) -> list[str]:
        file = _write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in rows])
        _ingest(file, bpe_tokenizer, tmp_path / name, held_out=0.2, seed=seed)
        return [decode(d.token_ids, skip_special_tokens=True) for d in _all(tmp_path / name / "held_out")]

    chosen = held_out("once", texts)
    assert len(chosen) == pytest.approx(300, abs=60)  # four standard deviations
    assert held_out("among_others", [*reversed(texts[:700]), "more"]) == [
        t for t in reversed(texts[:700]) if t in chosen
    ]
    assert held_out("twice", texts + texts) == chosen + chosen  # no text is on both sides
    assert set(held_out("other_seed", texts, seed=2)) != set(chosen)


def test_skipped_lines_are_counted_and_kept_with_their_place(tmp_path: Path, bpe_tokenizer: str) -> None:
    lines = [json.dumps({"text": t}).encode() for t in TEXTS]
    lines[3], lines[40], lines[41] = b"{broken", b'{"text": ""}', b'{"text": "\xff"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    report = _ingest(tmp_path / "a.jsonl", bpe_tokenizer, tmp_path / "s", on_error="skip", shard_bytes=900)
    assert report.skipped == {"broken JSON": 1, "empty document": 1, "invalid UTF-8": 1}
    assert len(report.lengths) == 57
    skipped = [json.loads(line) for line in (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()]
    assert [row["place"].rpartition(":")[2] for row in skipped] == ["4", "41", "42"]
    assert skipped[0]["raw"] == "{broken"
    assert "skipped      1 lines: broken JSON" in (tmp_path / "s" / "report.txt").read_text()


def test_a_bad_line_stops_and_the_mended_file_is_read_anew(tmp_path: Path, bpe_tokenizer: str) -> None:
    rows: list[Any] = [{"text": t} for t in TEXTS]
    file = _write_jsonl(tmp_path / "a.jsonl", [*rows[:50], 7, *rows[50:]])
    with pytest.raises(UserError, match=r"a\.jsonl:51: broken JSON"):
        _ingest(file, bpe_tokenizer, tmp_path / "s", shard_bytes=500)
    assert not (tmp_path / "s").exists()
    _ingest(_write_jsonl(file, rows), bpe_tokenizer, tmp_path / "s", shard_bytes=500)
    assert len(_all(tmp_path / "s")) == 60


def test_finished_shards_of_files_that_did_not_change_are_kept(tmp_path: Path, bpe_tokenizer: str) -> None:
    first = _write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    second = _write_jsonl(tmp_path / "b.jsonl", [{"text": "fine"}, {}])
    with pytest.raises(UserError, match=r"b\.jsonl:2: missing field"):
        _ingest([first, second, tmp_path / "." / "a.jsonl"], bpe_tokenizer, tmp_path / "s", shard_bytes=900)
    parts = {part: part.stat().st_ino for part in tmp_path.glob(".s.preparing/part-*")}
    assert len(parts) > 3
    _write_jsonl(second, [{"text": "mended"}, {}])
    with pytest.raises(UserError, match=r"b\.jsonl:2: missing field"):
        _ingest([first, second], bpe_tokenizer, tmp_path / "s", shard_bytes=900)
    assert {part: part.stat().st_ino for part in tmp_path.glob(".s.preparing/part-*")} == parts
    _write_jsonl(second, [{"text": "mended"}])
    _ingest([first, second], bpe_tokenizer, tmp_path / "s", shard_bytes=900)
    assert len(_all(tmp_path / "s")) == 61


def test_no_shard_is_kept_from_before_the_chat_template_changed(tmp_path: Path, bpe_tokenizer: str) -> None:
    shutil.copytree(bpe_tokenizer, tmp_path / "t")
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    files = [_write_jsonl(tmp_path / "a.jsonl", [chat]), _write_jsonl(tmp_path / "b.jsonl", [{}])]
    with pytest.raises(UserError, match="missing field"):
        _ingest(files, str(tmp_path / "t"), tmp_path / "s", messages_field="messages")
    template = tmp_path / "t" / "chat_template.jinja"
    template.write_text(template.read_text().replace("%}[{{", "%}({{"))
    _write_jsonl(files[1], [chat])
    _ingest(files, str(tmp_path / "t"), tmp_path / "s", messages_field="messages")
    first, second = _all(tmp_path / "s")
    assert first.token_ids.tolist() == second.token_ids.tolist()


def test_an_output_that_exists_is_kept_without_force(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    _ingest(file, bpe_tokenizer, tmp_path / "s")
    before = _bytes(tmp_path / "s")
    _write_jsonl(file, [{"text": "new and longer"}])
    with pytest.raises(UserError, match="--force"):
        _ingest(file, bpe_tokenizer, tmp_path / "s")
    assert _bytes(tmp_path / "s") == before
    _ingest(file, bpe_tokenizer, tmp_path / "s", force=True)
    assert _bytes(tmp_path / "s") != before


def test_a_file_that_changes_under_us_is_named(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    shards = plan_shards([file], text_by="line", shard_bytes=1 << 20)
    with file.open("a") as out:
        out.write('{"text": "late"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was being read"):
        ingest(shards, IngestOptions(), bpe_tokenizer, tmp_path / "s", processes=1, progress=False)


def test_a_full_disk_says_so_and_leaves_no_store(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS * 40])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(IngestFailure, match=r"cannot write .*GiB free.*run the same command again"):
            _ingest(file, bpe_tokenizer, tmp_path / "s", shard_bytes=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "s").exists()
    _ingest(file, bpe_tokenizer, tmp_path / "s", shard_bytes=20_000)
    assert len(_all(tmp_path / "s")) == 60 * 40


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


def test_a_store_moved_aside_by_a_killed_replacement_comes_back(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    _ingest(file, bpe_tokenizer, tmp_path / "s")
    before = _bytes(tmp_path / "s")
    (tmp_path / "s").rename(tmp_path / ".s.previous")
    with pytest.raises(UserError, match="--force"):
        _ingest(file, bpe_tokenizer, tmp_path / "s")
    assert _bytes(tmp_path / "s") == before


def test_a_second_process_says_that_it_waits(
    tmp_path: Path, bpe_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = plan_shards(
        [_write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])], text_by="line", shard_bytes=99
    )
    work, said = tmp_path / ".s.preparing", ""
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = (shards, IngestOptions(), bpe_tokenizer, tmp_path / "s")
        second = threading.Thread(target=ingest, args=arguments, kwargs={"processes": 1})
        second.start()
        deadline = time.monotonic() + 60
        while "another process is preparing" not in said and time.monotonic() < deadline:
            time.sleep(0.02)
            said += capsys.readouterr().err
        assert not (tmp_path / "s").exists()
    second.join()
    assert f"another process is preparing {tmp_path / 's'}: waiting for it" in said
    assert len(_all(tmp_path / "s")) == 1


def test_a_killed_worker_is_a_failure_that_keeps_finished_shards(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} {t}"} for i in range(60) for t in TEXTS])

    def kill_one() -> None:
        while not list(tmp_path.glob(".s.preparing/part-*")):
            time.sleep(0.01)
        children = psutil.Process().children()
        next(child for child in children if "spawn_main" in " ".join(child.cmdline())).kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(IngestFailure, match="a tokenizing process was killed"):
        _ingest(file, bpe_tokenizer, tmp_path / "s", shard_bytes=6_000, processes=2)
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
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} {t}"} for i in range(60) for t in TEXTS])
    _ingest(file, bpe_tokenizer, tmp_path / "want", held_out=0.1)
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
    assert _bytes(output) == _bytes(tmp_path / "want")
