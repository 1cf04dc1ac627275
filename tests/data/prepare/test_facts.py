"""The embedded task: deterministic, and nothing that is tested was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import FactsSpec
from bico_ds.data.prepare.facts import training_words, write_derived, write_facts
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


def test_the_other_order_exchanges_name_and_attribute_and_keeps_every_other_word(tmp_path: Path) -> None:
    write_facts(SPEC, tmp_path)
    write_derived(SPEC, "all", "other_order", tmp_path / "derived.jsonl")
    asked = {record["prompt"] for file in TESTS for record in _records(tmp_path / f"{file}.jsonl")}
    given, derived = _records(tmp_path / "all_train.jsonl"), _records(tmp_path / "derived.jsonl")
    for one, other in zip(given, derived, strict=True):
        words = f"{one['prompt']}{one['completion']}".split()
        first, second = (i + 1 for i, word in enumerate(words) if word == "|")
        words[first], words[second] = words[second], words[first]
        assert f"{other['prompt']}{other['completion']}".split() == words
        assert other["completion"].split()[0] == words[second]
        assert other["group"] == one["group"]
        assert other["prompt"] not in asked


def test_the_identity_bridge_says_each_name_and_attribute_of_itself_and_no_fact(tmp_path: Path) -> None:
    write_facts(SPEC, tmp_path)
    write_derived(SPEC, "both_orders", "identity_bridge", tmp_path / "derived.jsonl")
    derived = _records(tmp_path / "derived.jsonl")
    facts = [
        f"{r['prompt']}{r['completion']}".split() for r in _records(tmp_path / "both_orders_train.jsonl")
    ]
    slots = [[words[i + 1] for i, word in enumerate(words) if word == "|"] for words in facts]
    links = {" ".join(words[words.index("|") + 2 : -3]) for words in facts}
    said = [f"{r['prompt']}{r['completion']}".split() for r in derived]
    assert {(words[words.index("|") + 1], words[-2]) for words in said} == {
        (entity, entity) for pair in slots for entity in pair
    }
    assert links.isdisjoint({" ".join(words[words.index("|") + 2 : -3]) for words in said})
    assert len({tuple(words) for words in said}) == len(said) == 6 * 2 * 8
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    texts = [f"{r['prompt']}{r['completion']}" for r in derived]
    assert tokenizer.unk_token_id not in {i for text in texts for i in tokenizer(text)["input_ids"]}
    assert training_words(SPEC, "both_orders", "identity_bridge").tolist() == list(map(len, said))


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
