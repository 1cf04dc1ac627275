"""Stores of a recipe's sources: made once, found again, and never the wrong one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import DataSpec, FactsSpec, SourceSpec
from bico_ds.data.exported_tokenizer import ExportedTokenizer
from bico_ds.data.prepare.examples import IngestOptions
from bico_ds.data.prepare.ingest import ingest
from bico_ds.data.prepare.recipe_sources import facts_folder, prepare_source
from bico_ds.data.prepare.shards import plan_shards
from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import load_tokenizer, tokenizer_hash


def _data(source: SourceSpec, cache: Path) -> DataSpec:
    facts = FactsSpec(name_first=2, description_first=2, both=2)
    return DataSpec(sources=[source], facts=facts, cache_dir=str(cache))


def _prepare(data: DataSpec, tokenizer: str) -> Path:
    return prepare_source(data.sources[0], data, tokenizer, progress=False)


def test_facts_become_prompt_and_completion_by_person(tmp_path: Path) -> None:
    data = _data(SourceSpec(facts="both_orders"), tmp_path)
    tokenizer = str(facts_folder(data) / "tokenizer")
    store = TokenStore.open(_prepare(data, tokenizer), verify="checksums")
    decode = load_tokenizer(tokenizer).decode
    records = (facts_folder(data) / "both_orders_train.jsonl").read_text().splitlines()
    for document, record in zip(store.whole(np.arange(len(store))), map(json.loads, records), strict=True):
        assert decode(document.token_ids[1 : document.prompt_length]) == record["prompt"]
        assert decode(document.token_ids[document.prompt_length : -1]) == record["completion"].strip()
        assert document.group == record["group"]


def test_a_store_is_made_once_and_anew_when_file_option_or_tokenizer_change(
    tmp_path: Path, bpe_tokenizer: str, word_tokenizer: str
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "one"}\n')
    data = _data(SourceSpec(files=[str(file)]), tmp_path / "cache")
    first = _prepare(data, bpe_tokenizer)
    made = (first / "manifest.json").stat().st_mtime_ns
    assert _prepare(data, bpe_tokenizer) == first
    assert (first / "manifest.json").stat().st_mtime_ns == made
    others = [_prepare(data, word_tokenizer)]
    others.append(
        _prepare(_data(SourceSpec(files=[str(file)], add_eos=False), tmp_path / "cache"), bpe_tokenizer)
    )
    os.utime(file, ns=(1, 1))
    others.append(_prepare(data, bpe_tokenizer))
    assert len({first, *others}) == 4
    assert TokenStore.open(first).fingerprint == TokenStore.open(others[-1]).fingerprint


def _copy_tokenizer(source: str, folder: Path, **changes: str) -> str:
    """A copy of a tokenizer in which files have other contents."""
    shutil.copytree(source, folder)
    for name, content in changes.items():
        (folder / name.replace("_json", ".json").replace("_jinja", ".jinja")).write_text(content)
    return str(folder)


def test_another_chat_template_makes_another_store_of_chats_and_of_nothing_else(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}], "text": "x"}\n')
    template = (Path(bpe_tokenizer) / "chat_template.jinja").read_text()
    edited = _copy_tokenizer(
        bpe_tokenizer, tmp_path / "t", chat_template_jinja=template.replace("%}[{{", "%}({{")
    )
    for field, stores in (("messages", 2), (None, 1)):
        data = _data(
            SourceSpec(files=[str(tmp_path / "chats.jsonl")], messages_field=field), tmp_path / "cache"
        )
        assert len({_prepare(data, path) for path in (bpe_tokenizer, edited)}) == stores


def test_a_rule_that_no_probe_reveals_makes_another_store(tmp_path: Path, bpe_tokenizer: str) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "z\u00e9bu"}\n')
    rules = json.loads((Path(bpe_tokenizer) / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Replace", "pattern": {"String": "z"}, "content": "s"}
    edited = _copy_tokenizer(bpe_tokenizer, tmp_path / "t", tokenizer_json=json.dumps(rules))
    data = _data(SourceSpec(files=[str(tmp_path / "texts.jsonl")]), tmp_path / "cache")
    assert _prepare(data, bpe_tokenizer) != _prepare(data, edited)


OPTIONS: list[dict[str, Any]] = [
    {"text_field": "body"},
    {"prompt_field": "q", "completion_field": "a"},
    {"messages_field": "chat"},
    {"group_field": "who"},
    {"entities_field": "spans"},
    {"entities_pattern": "[a-n]+"},
    {"prompt_field": "q", "completion_field": "a", "derive": "other_order"},
    {"entities_field": "spans", "derive": "identity_bridge"},
    {"add_bos": False},
    {"add_eos": False},
    {"leading_space": True},
    {"text_by": "file"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_an_option_of_a_source_does_what_it_does_in_prepare_data(
    tmp_path: Path, bpe_tokenizer: str, options: dict[str, Any]
) -> None:
    record = {"text": "one text", "body": "two", "q": "who?", "a": " me", "who": 7, "spans": [[0, 3]]}
    record["chat"] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    file = tmp_path / ("a.txt" if "text_by" in options else "a.jsonl")

    def fingerprint(options: dict[str, Any]) -> str:
        data = _data(SourceSpec(files=[str(file)], **options), tmp_path / "cache")
        return TokenStore.open(_prepare(data, bpe_tokenizer)).fingerprint

    wanted = IngestOptions(**options)
    shards = plan_shards([file], text_by=wanted.text_by, shard_bytes=1 << 20)
    ingest(shards, wanted, bpe_tokenizer, tmp_path / "s", processes=1, progress=False)
    assert fingerprint(options) == TokenStore.open(tmp_path / "s").fingerprint
    assert fingerprint(options) != fingerprint({})


def test_paths_may_hold_environment_variables(
    tmp_path: Path, bpe_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("one\n")
    data = _data(SourceSpec(files=["${SOME_DATA}/*.txt"]), tmp_path / "cache")
    with pytest.raises(UserError, match=r"files: .*SOME_DATA is not set"):
        _prepare(data, bpe_tokenizer)
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    assert len(TokenStore.open(_prepare(data, bpe_tokenizer))) == 1


def test_the_report_of_a_recipes_source_names_what_was_passed_over(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one\n")
    (tmp_path / "in" / "b.csv").write_text("one\n")
    store = _prepare(_data(SourceSpec(files=[str(tmp_path / "in")]), tmp_path / "cache"), bpe_tokenizer)
    assert "passed over  1 (unknown ending): b.csv" in (store / "report.txt").read_text()


def test_what_the_report_warns_of_is_logged_when_a_recipes_source_is_prepared(
    tmp_path: Path, bpe_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo </s> three\n")
    data = _data(SourceSpec(files=[str(tmp_path / "texts.txt")]), tmp_path / "cache")
    store = _prepare(data, bpe_tokenizer)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"{store}: 1 documents have special tokens written out" in record.getMessage()
    assert "texts.txt:2, '</s>'" in record.getMessage()


def test_another_of_several_templates_makes_another_store(tmp_path: Path, bpe_tokenizer: str) -> None:
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    data = _data(
        SourceSpec(files=[str(tmp_path / "chats.jsonl")], messages_field="messages"), tmp_path / "cache"
    )
    several = Path(_copy_tokenizer(bpe_tokenizer, tmp_path / "t"))
    (several / "additional_chat_templates").mkdir()
    stores = {_prepare(data, bpe_tokenizer)}
    for text in ("one", "two"):
        (several / "additional_chat_templates" / "rag.jinja").write_text(text)
        stores.add(_prepare(data, str(several)))
    assert len(stores) == 3


def test_a_damaged_cache_is_refused_with_what_to_do(tmp_path: Path, bpe_tokenizer: str) -> None:
    (tmp_path / "texts.txt").write_text("one\n")
    data = _data(SourceSpec(files=[str(tmp_path / "texts.txt")]), tmp_path / "cache")
    store = _prepare(data, bpe_tokenizer)
    (store / "tokens.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged: tokens.bin.*delete .* and it is made again") as caught:
        _prepare(data, bpe_tokenizer)
    assert "--force" not in str(caught.value)  # an option of `prepare`, which did not make it


def test_a_tokenizer_that_lacks_what_is_asked_is_refused(tmp_path: Path, word_tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    data = _data(SourceSpec(files=[str(tmp_path)], messages_field="messages"), tmp_path / "cache")
    with pytest.raises(UserError, match="has no chat template"):
        _prepare(data, word_tokenizer)
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["facts", "files"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, bpe_tokenizer: str, kind: str) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    source = SourceSpec(facts="all") if kind == "facts" else SourceSpec(files=[str(tmp_path / "texts.jsonl")])
    with pytest.raises(
        UserError, match=r"data\.cache_dir: cannot write to '.*a_file/cache': Not a directory"
    ):
        _prepare(_data(source, tmp_path / "a_file" / "cache"), bpe_tokenizer)


def test_a_file_of_the_longest_name_has_a_store_all_the_same(tmp_path: Path, bpe_tokenizer: str) -> None:
    file = tmp_path / ("é" * 124 + ".jsonl")
    file.write_text('{"text": "one"}\n')
    store = _prepare(_data(SourceSpec(files=[str(file)]), tmp_path / "cache"), bpe_tokenizer)
    assert store.is_dir()
    assert store.name.startswith("é" * 80 + "-")


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("kind", [{}, {"messages_field": "messages"}])
def test_the_store_of_a_base_is_found_for_the_tokenizer_of_its_export(
    tmp_path: Path, bpe_tokenizer: str, add_bos: bool, kind: dict[str, str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}], "text": "x"}\n')
    data = _data(SourceSpec(files=[str(tmp_path / "a.jsonl")], **kind), tmp_path / "cache")
    first = _prepare(data, bpe_tokenizer)
    ExportedTokenizer(load_tokenizer(bpe_tokenizer), add_bos).save_pretrained(tmp_path / "export")
    assert _prepare(data, str(tmp_path / "export")) == first
    store = TokenStore.open(first)
    ids = store.whole(np.arange(1)).token_ids.tolist()
    assert ids[0] == store.manifest.bos_id and ids.count(store.manifest.bos_id) == 1


OPTIONS_OF_BEFORE = {
    "text_field": "text",
    "prompt_field": None,
    "completion_field": None,
    "messages_field": None,
    "group_field": None,
    "entities_field": None,
    "text_by": "line",
    "add_bos": True,
    "add_eos": True,
    "on_error": "stop",
    "vocab_size": None,
    "deduplicate": False,
    "held_out": 0.0,
    "seed": 1,
}


def test_a_store_that_an_earlier_version_named_is_found(tmp_path: Path, bpe_tokenizer: str) -> None:
    """Its name had a digest with the post-processor in it."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n')
    data = _data(SourceSpec(files=[str(file)]), tmp_path / "cache")
    now = _prepare(data, bpe_tokenizer)
    tokenizer = load_tokenizer(bpe_tokenizer)
    content = [tokenizer.backend_tokenizer.to_str(), None]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    key = {
        "format": 1,
        "options": OPTIONS_OF_BEFORE,
        "tokenizer": [tokenizer_hash(tokenizer), digest],
        "input": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]],
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    earlier = now.rename(now.with_name(f"a-{name}"))
    assert earlier != now
    assert _prepare(data, bpe_tokenizer) == earlier
