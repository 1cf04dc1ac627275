"""Every kind of input file and data set gives the same documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from bico_ds.common.errors import UserError
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.ingest import ingest
from bico_ds.data.prepare.shards import hub_shards, plan_shards
from bico_ds.data.tokenizer import load_tokenizer
from tests.data.prepare.ingesting import TEXTS, all_documents, contents, ingest_files, write_jsonl


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
    ingest_files(tmp_path / "folder", bpe_tokenizer, tmp_path / "want", shard_bytes=100)
    for file in ("a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"):
        ingest_files(tmp_path / file, bpe_tokenizer, tmp_path / f"{file}.store", shard_bytes=500)
        assert contents(tmp_path / f"{file}.store") == contents(tmp_path / "want"), file


def test_a_hub_data_set_gives_the_same_store(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    file = write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": t} for t in TEXTS])
    shards = hub_shards(str(tmp_path / "set"), config=None, split="train")
    ingest(shards, IngestOptions(), bpe_tokenizer, tmp_path / "hub", processes=1, progress=False)
    ingest_files(file, bpe_tokenizer, tmp_path / "want")
    assert contents(tmp_path / "hub") == contents(tmp_path / "want")
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
def test_a_slice_of_a_hub_split_gives_the_records_that_it_names(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch, split: str, want: list[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("bico_ds.data.prepare.shards._RECORDS_PER_SHARD", 8)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": t} for t in TEXTS])
    write_jsonl(tmp_path / "set" / "test.jsonl", [{"text": "a test"}])
    shards = hub_shards(str(tmp_path / "set"), config=None, split=split)
    ingest(shards, IngestOptions(), bpe_tokenizer, tmp_path / "hub", processes=1, progress=False)
    decode = load_tokenizer(bpe_tokenizer).decode
    assert [decode(d.token_ids, skip_special_tokens=True) for d in all_documents(tmp_path / "hub")] == want


def test_a_text_file_can_be_one_document(tmp_path: Path, bpe_tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("first line\nsecond line\n")
    ingest_files(
        tmp_path / "a.txt", bpe_tokenizer, tmp_path / "s", text_by="file", add_bos=False, add_eos=False
    )
    (document,) = all_documents(tmp_path / "s")
    assert load_tokenizer(bpe_tokenizer).decode(document.token_ids) == "first line\nsecond line\n"


@pytest.mark.parametrize("text_by", ["line", "file"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, bpe_tokenizer: str, text_by: str) -> None:
    for name, mark in (("marked", b"\xef\xbb\xbf"), ("plain", b"")):
        (tmp_path / f"{name}.txt").write_bytes(mark + "first\nsecond \ufeff\n".encode())
        ingest_files(tmp_path / f"{name}.txt", bpe_tokenizer, tmp_path / name, text_by=text_by)
    assert contents(tmp_path / "marked") == contents(tmp_path / "plain")


def test_blank_lines_of_a_text_are_no_documents(tmp_path: Path, bpe_tokenizer: str) -> None:
    blank = ["", " \t", "\u00a0", "\u2003 \u00a0", "\u3000"]
    (tmp_path / "a.txt").write_bytes(("\ufeff\n" + "one\r\n".join(line + "\n" for line in blank)).encode())
    report = ingest_files(tmp_path / "a.txt", bpe_tokenizer, tmp_path / "s")
    assert (len(report.lengths), report.skipped) == (len(blank) - 1, {})


def test_a_file_that_changes_under_us_is_named(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    shards = plan_shards([file], text_by="line", shard_bytes=1 << 20)
    with file.open("a") as out:
        out.write('{"text": "late"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was being read"):
        ingest(shards, IngestOptions(), bpe_tokenizer, tmp_path / "s", processes=1, progress=False)
