"""The final store: the same bytes whatever the shards, duplicates dropped, documents held out, skipped lines kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import load_tokenizer
from tests.data.prepare.ingesting import TEXTS, all_documents, contents, ingest_files, write_jsonl


def test_shards_and_processes_change_no_byte(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    settings: dict[str, Any] = {"deduplicate": True, "held_out": 0.2}
    ingest_files(file, bpe_tokenizer, tmp_path / "one", **settings)
    ingest_files(file, bpe_tokenizer, tmp_path / "many", shard_bytes=700, processes=2, **settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_duplicates_go_and_groups_are_never_torn_by_the_held_out_split(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    records = [{"text": text, "who": i % 12} for i, text in enumerate(TEXTS)]
    file = write_jsonl(tmp_path / "a.jsonl", records + records[:10])
    report = ingest_files(
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

    def held_out(name: str, records: list[str], seed: int = 1) -> list[str]:
        file = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in records])
        ingest_files(file, bpe_tokenizer, tmp_path / name, held_out=0.2, seed=seed)
        return [
            decode(d.token_ids, skip_special_tokens=True) for d in all_documents(tmp_path / name / "held_out")
        ]

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
    report = ingest_files(
        tmp_path / "a.jsonl", bpe_tokenizer, tmp_path / "s", on_error="skip", shard_bytes=900
    )
    assert report.skipped == {"broken JSON": 1, "empty document": 1, "invalid UTF-8": 1}
    assert len(report.lengths) == 57
    skipped = [json.loads(line) for line in (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()]
    assert [record["place"].rpartition(":")[2] for record in skipped] == ["4", "41", "42"]
    assert skipped[0]["raw"] == "{broken"
    assert "skipped      1 lines: broken JSON" in (tmp_path / "s" / "report.txt").read_text()
