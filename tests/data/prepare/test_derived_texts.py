"""Texts derived from texts: what they say, where there are none, and that none gives away what its origin hides."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bico_ds.commands.prepare.command import main as prepare
from bico_ds.commands.search_split import split
from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import Derive
from bico_ds.data.prepare.derived_texts import NothingDerivedError, derive
from bico_ds.data.prepare.examples import Example, IngestOptions, make_example
from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import load_tokenizer
from tests.data.prepare.ingesting import all_documents, ingest_files, write_jsonl

FIELDS = {"prompt_field": "prompt", "completion_field": "completion"}
PUBLISHED = Path(os.environ.get("BICO_DS_DATA", "")) / "name_description"

words = st.lists(st.text("abcXYZé北.,?", min_size=1, max_size=4), min_size=1, max_size=4).map(" ".join)
gaps = st.sampled_from(["", " ", "  ", "\n"])


def _texts(store: Path) -> list[str]:
    decode = load_tokenizer(store / "tokenizer").decode
    return [decode(document.token_ids, skip_special_tokens=True) for document in all_documents(store)]


@settings(deadline=None)
@given(prompt=words, before=gaps, after=gaps, completion=words)
def test_completion_and_prompt_change_places_and_the_white_space_between_them_stays(
    prompt: str, before: str, after: str, completion: str
) -> None:
    text = f"{prompt}{before}{after}{completion}"
    (other,) = derive(Example(text, len(prompt + before), 7, None), "other_order")
    assert other.text == f"{completion}{before}{after}{prompt}"
    assert (other.text[: other.prompt_chars], other.group) == (completion, 7)
    (back,) = derive(other, "other_order")
    assert back.text == text


@settings(deadline=None)
@given(parts=st.lists(words, min_size=5, max_size=5), data=st.data())
def test_two_entities_change_places_and_the_prompt_keeps_its_other_words(
    parts: list[str], data: st.DataObject
) -> None:
    opening, one, link, two, end = parts
    two += "2"  # never the same entity twice
    given_text = f"{opening}{one}{link}{two}{end}"
    part = data.draw(st.sampled_from([0, 2, 4]))
    cut = data.draw(st.integers(0, len(parts[part])))
    first, second = len(opening), len(f"{opening}{one}{link}")
    spans = data.draw(st.permutations([(first, first + len(one)), (second, second + len(two))]))
    before = [opening, one, link, two]
    border = len("".join(before[:part])) + cut
    (other,) = derive(Example(given_text, border, 7, spans), "other_order")
    assert other.text == f"{opening}{two}{link}{one}{end}"
    assert [other.text[a:b] for a, b in other.entities or ()] == [two, one]
    exchanged = [opening, two, link, one]
    assert other.text[: other.prompt_chars] == "".join(exchanged[:part]) + parts[part][:cut]
    (back,) = derive(other, "other_order")
    assert (back.text, back.prompt_chars) == (given_text, border)


@pytest.mark.parametrize(
    ("example", "kind", "reason"),
    [
        (Example("Bob", 0, -1, None), "other_order", "the prompt is empty"),
        (Example("  Bob", 2, -1, None), "other_order", "the prompt is empty"),
        (Example("Al Bo Cy", 0, -1, [(0, 2), (3, 5), (6, 8)]), "other_order", "not exactly two"),
        (Example("Al", 0, -1, [(0, 2)]), "other_order", "not exactly two"),
        (Example("Al is Al", 0, -1, [(0, 2), (6, 8)]), "other_order", "are the same"),
        (Example("Al is Bo", 7, -1, [(0, 2), (6, 8)]), "other_order", "ends within an entity"),
        (Example("Al is Bo", 0, -1, []), "identity_bridge", "no entity"),
        (Example("Al  Bo", 0, -1, [(2, 4)]), "identity_bridge", "no entity"),
    ],
)
def test_a_text_of_which_nothing_follows_says_why(example: Example, kind: Derive, reason: str) -> None:
    with pytest.raises(NothingDerivedError, match=reason):
        derive(example, kind)


def test_every_entity_of_a_text_is_said_once_to_be_itself_and_is_the_completion() -> None:
    bridges = derive(Example("Al, Bo and Al", 5, 7, [(0, 2), (4, 6), (11, 13)]), "identity_bridge")
    assert [bridge.text for bridge in bridges] == ["The name of Al is Al.", "The name of Bo is Bo."]
    for bridge, name in zip(bridges, ("Al", "Bo"), strict=True):
        assert bridge.text[bridge.prompt_chars :] == f" {name}."
        assert [bridge.text[a:b] for a, b in bridge.entities or ()] == [name, name]
        assert bridge.group == 7


def _people(count: int) -> list[dict[str, Any]]:
    """Two texts for each person, who is the group; the entities are the capitalized words."""
    return [
        {"prompt": f"{start} Person{i}x is", "completion": f" Thing{i}x.", "person": f"p{i}"}
        for i in range(count)
        for start in ("now", "and")
    ]


PATTERN = r"\b(Person|Thing)\d+x"


def test_a_store_has_one_bridge_for_each_entity_however_many_records_and_shards_name_it(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", _people(9))
    settings = {**FIELDS, "entities_pattern": PATTERN, "derive": "identity_bridge"}
    report = ingest_files(file, bpe_tokenizer, tmp_path / "s", shard_bytes=200, **settings)
    names = [f"{kind}{i}x" for i in range(9) for kind in ("Person", "Thing")]
    assert _texts(tmp_path / "s") == [f"The name of {name} is {name}." for name in names]
    documents = all_documents(tmp_path / "s")
    assert documents.entity_number is not None and set(documents.entity_number.tolist()) == {0, 1, 2}
    assert report.duplicates == 18
    assert "derived      identity_bridge" in (tmp_path / "s" / "report.txt").read_text()


def test_records_that_give_no_text_are_counted_and_named_and_the_others_stay(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    records = [{"text": t} for t in ("Al knows Bo", "nobody", "Al, Bo and Cy", "Bo knows Cy", "Cy alone")]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    settings = {"entities_pattern": "[A-Z][a-z]", "derive": "other_order"}
    report = ingest_files(file, bpe_tokenizer, tmp_path / "s", **settings)
    assert _texts(tmp_path / "s") == ["Bo knows Al", "Cy knows Bo"]
    (warning,) = report.warnings
    assert warning.startswith(
        "3 documents give no derived text (it has not exactly two entities) (the first: "
    )
    assert "a.jsonl:2)" in warning


def test_an_input_of_which_nothing_follows_is_refused_with_the_reason(
    tmp_path: Path, bpe_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "Al"}, {"text": "Al Bo Cy"}])
    given_options = ["--entities-pattern", "[A-Z][a-z]", "--derive", "other_order", "--processes", "1"]
    where = ["--tokenizer", bpe_tokenizer, "--output", str(tmp_path / "s")]
    assert prepare(["files", str(file), *given_options, *where]) == 2
    message = capsys.readouterr().err
    assert "derive other_order makes no text of the input: 2 documents give no derived text" in message
    assert "not exactly two entities" in message and f"{file}:1" in message
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("kind", ["other_order", "identity_bridge"])
def test_what_is_derived_from_a_held_out_group_is_held_out_in_the_store_of_derived_texts_too(
    tmp_path: Path, bpe_tokenizer: str, kind: Derive
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", _people(40))
    settings = {**FIELDS, "group_field": "person", "entities_pattern": PATTERN, "held_out": 0.4}
    for name, extra in (("own", {}), ("derived", {"derive": kind})):
        ingest_files(file, bpe_tokenizer, tmp_path / name, **settings, **extra)
    groups = {
        path: set(TokenStore.open(tmp_path / path).groups.tolist())
        for path in ("own", "derived", "own/held_out", "derived/held_out")
    }
    assert groups["own"] == groups["derived"]
    assert groups["own/held_out"] == groups["derived/held_out"]
    assert groups["own"].isdisjoint(groups["own/held_out"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"derive": "other_order"}, r"--entities-pattern \(or --prompt-field"),
        ({**FIELDS, "derive": "identity_bridge"}, "needs to know the entities"),
        ({"messages_field": "m", "derive": "other_order"}, "no texts of chats"),
        ({"entities_field": "e", "entities_pattern": "x"}, "exclude each other"),
        ({"entities_pattern": ""}, "--entities-pattern is empty"),
        ({"entities_pattern": "("}, "no regular expression: missing"),
        ({**FIELDS, "derive": "other_order", "held_out": 0.1}, "needs --group-field"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        IngestOptions(**options)


@pytest.mark.skipif(
    "BICO_DS_DATA" not in os.environ or not PUBLISHED.is_dir(),
    reason="BICO_DS_DATA names no folder with name_description/ (Berglund et al.'s published sets)",
)
def test_texts_derived_from_the_search_split_hold_no_question_of_its_tests(tmp_path: Path) -> None:
    split(PUBLISHED, tmp_path / "split")
    records = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in (tmp_path / "split").iterdir()
    }
    questions = [
        record["prompt"] for name, read in records.items() if name.endswith("_test") for record in read
    ]
    names = r"\b[A-Z][a-z]+ [A-Z][a-z]+\b"
    given_records = records["all_prompts_train"]
    for kind, more in (("other_order", {}), ("identity_bridge", {"entities_pattern": names})):
        options = IngestOptions(**FIELDS, **more, derive=kind)
        examples = [make_example(record, options, None) for record in given_records]
        derived = [other for example in examples for other in derive(example, kind)]
        assert not any(question in text.text for text in derived for question in questions)
        if kind == "other_order":
            assert [Counter(text.text.split()) for text in derived] == [
                Counter(example.text.split()) for example in examples
            ]
