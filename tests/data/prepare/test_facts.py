"""The embedded task: deterministic, and nothing that is tested was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import FactsSpec
from bico_ds.data.prepare.facts import write_facts
from bico_ds.data.tokenizer import load_tokenizer

SPEC = FactsSpec(name_first=5, description_first=4, both=6)
TESTS = ["p2d_prompts_test", "d2p_prompts_test", "p2d_reverse_prompts_test", "d2p_reverse_prompts_test"]


def _records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_same_spec_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, spec in (("a", SPEC), ("b", SPEC), ("c", SPEC.model_copy(update={"seed": 2}))):
        write_facts(spec, tmp_path / name)
    a, b, c = (_contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a["all_train.jsonl"] != c["all_train.jsonl"]
    assert a["tokenizer/tokenizer.json"] == c["tokenizer/tokenizer.json"]


def test_records_have_the_promised_counts_and_groups(tmp_path: Path) -> None:
    write_facts(SPEC, tmp_path)
    assert len(_records(tmp_path / "all_train.jsonl")) == (5 + 4 + 6 * 2) * 6
    assert {record["group"] for record in _records(tmp_path / "both_orders_train.jsonl")} == set(range(9, 15))
    for file, persons in zip(TESTS, (range(5), range(5, 9), range(5), range(5, 9)), strict=True):
        records = _records(tmp_path / f"{file}.jsonl")
        assert len(records) == len(persons) * 4
        assert {record["group"] for record in records} == set(persons)


def test_no_test_prompt_was_trained_and_reversed_facts_never_appear(tmp_path: Path) -> None:
    write_facts(SPEC, tmp_path)
    trained = _records(tmp_path / "all_train.jsonl")
    prompts = {record["prompt"] for record in trained}
    for file in TESTS:
        for record in _records(tmp_path / f"{file}.jsonl"):
            assert record["prompt"] not in prompts
            same_answer = [t for t in trained if t["completion"].split()[0] == record["completion"].strip()]
            assert bool(same_answer) == ("reverse" not in file)


def test_a_word_is_one_token_wherever_it_stands(tmp_path: Path) -> None:
    write_facts(SPEC, tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for file in ["all_train", *TESTS]:
        for record in _records(tmp_path / f"{file}.jsonl"):
            text = record["prompt"] + record["completion"]
            joint = tokenizer(text)["input_ids"]
            apart = tokenizer(record["prompt"])["input_ids"]
            apart += tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
            assert joint == apart
            assert len(joint) == 1 + len(text.split())
            assert tokenizer.unk_token_id not in joint
            assert tokenizer.decode(joint, skip_special_tokens=True) == text


def test_the_whole_lexicon_has_no_word_twice(tmp_path: Path) -> None:
    write_facts(FactsSpec(both=984, variants=1, test_prompts=1), tmp_path)
    assert len(load_tokenizer(tmp_path / "tokenizer")) > 2 * 1024
    with pytest.raises(UserError, match="at most 1024 persons"):
        write_facts(FactsSpec(both=985), tmp_path / "more")


def test_too_many_variants_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"variants \(61\)"):
        write_facts(FactsSpec(variants=61), tmp_path)
