"""Bad input: every mistake is named with its place, before anything is written."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from bico_ds.common.errors import UserError
from bico_ds.data.prepare import input_files, records
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.ingest import ingest
from bico_ds.data.prepare.input_files import find_files
from bico_ds.data.prepare.output_folder import refuse_output
from bico_ds.data.prepare.shards import plan_shards
from bico_ds.data.store import TokenStore

GOOD = b'{"text": "a fine line"}\n'
PAIR = {"prompt_field": "q", "completion_field": "a"}


def _records(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _parquet(columns: dict[str, list]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


HALF = "hi \ud83d"  # half a character, as JSON can escape it


def _chat(**changes: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hi", **changes}, {"role": "assistant", "content": "yes"}]


LINES: list[tuple[str, bytes, dict[str, Any], str]] = [
    ("a.jsonl", GOOD + b'{"text": "x"\n', {}, "a.jsonl:2: broken JSON: Expecting ',' delimiter at column 13"),
    ("a.json", b'[{"text": "x"}]', {}, "a.json:1: broken JSON: expected an object, found list"),
    ("a.json", b'[\n{"text": "x"}]', {}, "is this a JSON array? One object per line is needed"),
    ("a.jsonl", GOOD + b"17\n", {}, "a.jsonl:2: broken JSON: expected an object, found int"),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000, {}, "a.jsonl:1: broken JSON"),
    ("a.jsonl", b'{"text": ' + b"9" * 5_000 + b"}", {}, "a.jsonl:1: broken JSON"),
    (
        "a.jsonl",
        GOOD + b"\n" + _records({"txet": "x"}),
        {},
        "a.jsonl:3: missing field: 'text' (did you mean 'txet'?)",
    ),
    ("a.jsonl", _records({"text": None}), {}, "a.jsonl:1: missing field: 'text' is null"),
    ("a.jsonl", _records({"text": 5}), {}, "a.jsonl:1: wrong type: 'text' must be a string, found int"),
    (
        "a.jsonl",
        b'{"text": "x", "text": "y"}\n',
        {},
        "a.jsonl:1: broken JSON: the key 'text' stands there twice",
    ),
    (
        "a.jsonl",
        _records({"text": "x", "g": HALF}),
        {"group_field": "g"},
        "a.jsonl:1: invalid UTF-8: a group has a lone surrogate at character 4",
    ),
    *(
        ("a.jsonl", _records({"m": chat}), {"messages_field": "m"}, f"a.jsonl:1: {message}")
        for chat, message in (
            (
                _chat(content=HALF),
                "invalid UTF-8: the text of the messages has a lone surrogate at character",
            ),
            (_chat(content=[{"type": "text", "text": HALF}]), "invalid UTF-8"),
            (_chat(role=HALF), "chat template: role hi \\ud83d"),
            (_chat(tool_calls=7), "wrong type: the tool_calls of message 1 must be a list, found int"),
            (_chat(tool_calls=True), "wrong type: the tool_calls of message 1 must be a list, found bool"),
            (_chat(tool_calls=[{"name": HALF}]), "chat template: it leaves out a tool call of message 1"),
        )
    ),
    (
        "a.jsonl",
        _records({"t\ud83d" * 9000: "x"}),
        {},
        "missing field: 'text'; fields of this record: t\\ud83dt",
    ),
    (
        "a.jsonl",
        GOOD + _records({"prompt": "x", "completion": "y"}),
        {},
        "a.jsonl:2: missing field: 'text'; fields of this record: completion, prompt. This row is of another kind "
        "(--prompt-field prompt --completion-field completion). Rows of two kinds make two sources",
    ),
    (
        "a.jsonl",
        GOOD,
        {"messages_field": "m"},
        "This row is of another kind (--text-field text, the default)",
    ),
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', {}, "a.jsonl:2: invalid UTF-8: byte 11 of the line is 0xff"),
    (
        "a.jsonl",
        b'{"text": "\\ud800"}',
        {},
        "a.jsonl:1: invalid UTF-8: 'text' has a lone surrogate at character 1",
    ),
    ("a.jsonl", _records({"text": ""}), {}, "a.jsonl:1: empty document"),
    ("a.jsonl", GOOD + _records({"text": " \n\t"}), {}, "a.jsonl:2: empty document"),
    ("a.jsonl", _records({"q": "x", "a": " "}), PAIR, "a.jsonl:1: empty document: 'a' has no text"),
    ("a.jsonl", _records({"q": "x"}), PAIR, "a.jsonl:1: missing field: 'a'"),
    ("a.jsonl", GOOD, {"vocab_size": 40}, "a.jsonl:1: token id past the vocabulary: id"),
    ("a.jsonl", _records({"text": "x", "g": 1.5}), {"group_field": "g"}, "a.jsonl:1: wrong type: a group is"),
    ("a.jsonl", _records({"text": "x", "e": 3}), {"entities_field": "e"}, "entities must be a list"),
    ("a.jsonl", _records({"text": "x", "e": [[1]]}), {"entities_field": "e"}, "an entity is a pair"),
    (
        "a.jsonl",
        _records({"text": "x", "e": [[0, 2]]}),
        {"entities_field": "e"},
        "[0, 2] in a text of 1 characters",
    ),
    (
        "a.jsonl",
        _records({"text": "abc", "e": [[1, 3], [0, 2]]}),
        {"entities_field": "e"},
        "overlapping entities",
    ),
    ("a.jsonl", _records({"m": "hi"}), {"messages_field": "m"}, "messages must be a list of objects"),
    (
        "a.jsonl",
        _records({"m": [{"role": "user"}]}),
        {"messages_field": "m"},
        "message 1 lacks 'role' or 'content'",
    ),
    (
        "a.jsonl",
        _records({"m": [{"role": "clown", "content": "x"}]}),
        {"messages_field": "m"},
        "a.jsonl:1: chat template: role clown",
    ),
    (
        "a.jsonl.gz",
        gzip.compress(GOOD * 9)[:-12],
        {},
        "cannot read on, the file is damaged (Compressed file ended",
    ),
    ("a.jsonl.gz", GOOD, {}, "a.jsonl.gz:1: cannot read on, the file is damaged (Not a gzipped file"),
    ("a.jsonl.zst", zstandard.compress(GOOD * 9)[:-8], {}, "damaged (Truncated compressed stream)"),
    ("a.jsonl.zst", GOOD, {}, "a.jsonl.zst:1: cannot read on, the file is damaged"),
    ("a.txt", b"fine\nnot \xe9 fine\n", {}, "a.txt:2: invalid UTF-8: byte 5 is 0xe9"),
    ("a.parquet", b"PAR1 not", {}, "a.parquet is no readable Parquet file"),
    ("a.parquet", _parquet({"body": ["x"]}), {}, "a.parquet has no column 'text'; its columns are body"),
    ("a.parquet", _parquet({"text": ["x", None]}), {}, "a.parquet: row 2: missing field: 'text'"),
    ("a.csv", GOOD, {}, "a.csv: unknown kind of file; known are .jsonl"),
    ("a.jsonl", b"\n \n", {}, "the input has no documents"),
    ("a.jsonl", b"", {}, "the input has no documents, its files are empty"),
    ("a.parquet", _parquet({"text": []}), {}, "the input has no documents"),
    (
        "a.jsonl",
        b"{}\n7\n{}\n",
        {"on_error": "skip"},
        "no documents; 1 lines skipped: broken JSON; 2 lines skipped: missing field (--on-error stop names the first)",
    ),
    (
        "a.jsonl",
        GOOD * 3,
        {"held_out": 0.999999},
        "--held-out 0.999999 takes all 3 documents: give a smaller",
    ),
]


def _ingest(file: Path, tokenizer: str, output: Path, settings: dict[str, Any]) -> None:
    shards = plan_shards(find_files([str(file)]), text_by="line", shard_bytes=1 << 20)
    ingest(shards, IngestOptions(**settings), tokenizer, output, processes=1, progress=False)


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    LINES,
    ids=[f"{i}-{line[3][:40]}" for i, line in enumerate(LINES)],
)
def test_a_bad_file_is_named_with_its_line(
    tmp_path: Path, bpe_tokenizer: str, name: str, content: bytes, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        _ingest(tmp_path / name, bpe_tokenizer, tmp_path / "store", settings)
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("bad", "settings"),
    [
        (
            [{"m": _chat(content=HALF)}, {"m": _chat(role=HALF)}, {"m": _chat(tool_calls=7)}, {HALF: "x"}],
            {"messages_field": "m"},
        ),
        (
            [{"text": "x", "who": HALF}, {"text": HALF, "who": 1}, {HALF: "x"}, {"text": "x", "who": [HALF]}],
            {"group_field": "who"},
        ),
    ],
    ids=["chats", "texts"],
)
def test_records_with_half_a_character_or_an_odd_type_are_skipped_and_counted(
    tmp_path: Path, bpe_tokenizer: str, bad: list[Any], settings: dict[str, Any]
) -> None:
    good = {"m": _chat(), "text": "x", "who": "y"}
    (tmp_path / "a.jsonl").write_bytes(_records(good, *bad, good))
    _ingest(tmp_path / "a.jsonl", bpe_tokenizer, tmp_path / "s", {"on_error": "skip", **settings})
    assert len(TokenStore.open(tmp_path / "s")) == 2
    skipped = (tmp_path / "s" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    places = [json.loads(line)["place"].rpartition(":")[2] for line in skipped]
    assert places == [str(2 + number) for number in range(len(bad))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_line_without_an_end_is_an_error_of_its_own_and_the_next_one_is_read(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(records, "MOST_RECORD_BYTES", 1000)
    monkeypatch.setattr(records, "_PART_BYTES", 700)
    content = GOOD + b"x" * 5000 + b"\n" + GOOD + b"y" * 5000
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=f"{name}:2: too long: the line has more than 1,000 bytes"):
        _ingest(tmp_path / name, bpe_tokenizer, tmp_path / "s", {})
    _ingest(tmp_path / name, bpe_tokenizer, tmp_path / "s", {"on_error": "skip"})
    assert len(TokenStore.open(tmp_path / "s")) == 2
    assert "skipped      2 lines: too long" in (tmp_path / "s" / "report.txt").read_text()
    assert (tmp_path / "s" / "skipped.jsonl").stat().st_size < 3000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("byte", [b"x", b"\n"])
def test_a_compressed_file_that_becomes_far_larger_is_taken_for_a_bomb(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch, name: str, byte: bytes
) -> None:
    monkeypatch.setattr(input_files, "_ALWAYS_ALLOWED_BYTES", 1 << 18)
    monkeypatch.setattr(records, "MOST_RECORD_BYTES", 1 << 14)
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    (tmp_path / name).write_bytes(compress(GOOD + byte * (1 << 21)))
    with pytest.raises(UserError, match="is it a bomb"):
        _ingest(tmp_path / name, bpe_tokenizer, tmp_path / "s", {"on_error": "skip"})


def test_a_compressed_file_of_empty_lines_is_a_bomb_long_before_its_bytes_are_many(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "_ALWAYS_ALLOWED_BYTES", 1 << 18)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD + b"\n" * (1 << 13)))
    with pytest.raises(UserError, match="more than 4,096 lines, when it is decompressed: is it a bomb"):
        _ingest(tmp_path / "a.jsonl.gz", bpe_tokenizer, tmp_path / "s", {})


@pytest.mark.parametrize("given", ["x" * 5000, "a\0b", "[" + "/root/x/" * 900, "\ud83d.jsonl"])
def test_an_input_whose_name_cannot_be_one_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="input '"):
        find_files([given])


def test_an_output_whose_name_cannot_be_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write to '.*: File name too long"):
        refuse_output(tmp_path / ("x" * 5000), force=False)


def test_a_folder_with_links_in_a_circle_and_a_name_that_is_no_text_is_read(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "circle.jsonl").symlink_to(tmp_path / "data" / "circle.jsonl")
    (tmp_path / "data" / os.fsdecode(b"a\xff.jsonl")).write_bytes(GOOD + b"7\n")
    with pytest.raises(UserError) as caught:
        _ingest(tmp_path / "data", bpe_tokenizer, tmp_path / "s", {})
    assert "udcff.jsonl:2: broken JSON" in str(caught.value)
    _ingest(tmp_path / "data", bpe_tokenizer, tmp_path / "s", {"on_error": "skip"})
    assert "udcff.jsonl:2" in (tmp_path / "s" / "skipped.jsonl").read_text(encoding="utf-8")


CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: find_files(["absent.jsonl"]), "input 'absent.jsonl' does not exist"),
    (lambda: IngestOptions(prompt_field="q"), "--prompt-field and --completion-field go together"),
    (lambda: IngestOptions(messages_field="m", entities_field="e"), "--messages-field excludes"),
    (lambda: IngestOptions(text_field="t", messages_field="m"), "--text-field excludes --prompt-field and"),
    (lambda: IngestOptions(text_field="t", **PAIR), "--text-field excludes --prompt-field and"),
    (lambda: IngestOptions(held_out=1.5), "--held-out must be a fraction in [0, 1), found 1.5"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message for _, message in CALLS])
def test_a_wrong_option_or_path_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no input files"):
        find_files([str(tmp_path)])


def test_a_held_out_share_of_nothing_is_refused(tmp_path: Path, bpe_tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match="give a larger fraction"):
        _ingest(tmp_path / "a.jsonl", bpe_tokenizer, tmp_path / "s", {"held_out": 1e-9})
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
