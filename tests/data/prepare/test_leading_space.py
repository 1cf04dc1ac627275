"""Texts tokenized with a space before them: a word has one form, wherever it stands or a reversed text puts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.reverse import ReverseSpec
from bico_ds.data.prepare.examples import Example, with_leading_space
from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import load_tokenizer, special_ids
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.reverse import ReverseTraining
from tests.data.prepare.ingesting import all_documents, ingest_files, write_jsonl

TEXT = "return for import and import for return"  # each a token of the tokenizer, with the space before it


def both_stores(folder: Path, tokenizer_path: str) -> Iterator[tuple[bool, Path]]:
    """Stores of TEXT without and with the space."""
    file = write_jsonl(folder / "a.jsonl", [{"text": TEXT}])
    for leading_space in (False, True):
        store = folder / f"store-{leading_space}"
        ingest_files(file, tokenizer_path, store, leading_space=leading_space)
        yield leading_space, store


def reversed_text(store: Path, tokenizer_path: str) -> str:
    """The first document's text after reverse training by words, as the model reads it."""
    tokenizer, opened = load_tokenizer(Path(tokenizer_path)), TokenStore.open(store)
    objective = ReverseTraining(spec=ReverseSpec(), special_ids=tuple(special_ids(tokenizer)))
    batch = objective.build(opened.whole(np.array([0])), BatchKey(seed=1, epoch=0))
    return tokenizer.decode(batch.input_ids)


def test_a_first_word_has_the_form_of_the_others_and_keeps_its_space_where_it_is_moved(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    for leading_space, store in both_stores(tmp_path, bpe_tokenizer):
        (document,) = all_documents(store)
        words = np.split(document.token_ids[1:-1], np.flatnonzero(document.word_starts[1:-1])[1:])
        first, last = words[0].tolist(), words[-1].tolist()  # both are return
        assert (first == last) == leading_space
        assert len(last) == 1 and words[2].tolist() == words[4].tolist()
        assert len(words) == 7 and document.word_starts[[0, 1, -1]].all()
        glued = "" if not leading_space else " "
        text = reversed_text(store, bpe_tokenizer)
        assert text == f"<s> return for import and import for{glued}return</s>"


def test_only_texts_that_begin_without_white_space_get_one_and_spans_and_prompts_move_along() -> None:
    example = Example("Ann sings", prompt_chars=3, group=4, entities=[(0, 3), (4, 9)])
    assert with_leading_space(example) == Example(" Ann sings", 4, 4, [(1, 4), (5, 10)])
    assert with_leading_space(Example("Ann", 0, -1, None)) == Example(" Ann", 0, -1, None)
    for text in (" Ann", "\nAnn"):
        assert with_leading_space(Example(text, 0, -1, [])).text == text


def test_prompts_and_entities_are_those_of_the_text(tmp_path: Path, bpe_tokenizer: str) -> None:
    records = [{"q": "return for", "a": " import", "spans": [[0, 6], [11, 17]]}]
    file, decode = write_jsonl(tmp_path / "a.jsonl", records), load_tokenizer(Path(bpe_tokenizer)).decode
    fields = {"prompt_field": "q", "completion_field": "a", "entities_field": "spans"}
    ingest_files(file, bpe_tokenizer, tmp_path / "s", leading_space=True, **fields)
    (document,) = all_documents(tmp_path / "s")
    assert decode(document.token_ids[: document.prompt_length]) == "<s> return for"
    assert [decode(document.token_ids[a:b]) for a, b in document.entity_spans] == [" return", " import"]


def test_the_manifest_tells_of_it_and_that_of_other_stores_is_as_before(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    for leading_space, store in both_stores(tmp_path, bpe_tokenizer):
        stated = json.loads((store / "manifest.json").read_text())
        assert (
            stated.get("leading_space", False)
            == leading_space
            == TokenStore.open(store).manifest.leading_space
        )
        assert ("leading_space" in stated) == leading_space
    # A space that is a text's own makes the same tokens, and another store.
    spaced = write_jsonl(tmp_path / "b.jsonl", [{"text": f" {TEXT}"}])
    ingest_files(spaced, bpe_tokenizer, tmp_path / "own")
    own, given = TokenStore.open(tmp_path / "own"), TokenStore.open(tmp_path / "store-True")
    assert own.manifest.checksums == given.manifest.checksums
    assert own.fingerprint != given.fingerprint


def test_where_a_space_would_take_the_one_form_away_or_comes_from_a_template_it_is_refused(
    tmp_path: Path, bpe_tokenizer: str, word_tokenizer: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": TEXT}])
    with pytest.raises(UserError, match="the form of the others already: leave out --leading-space"):
        ingest_files(file, word_tokenizer, tmp_path / "s", leading_space=True)
    with pytest.raises(UserError, match="--messages-field excludes --leading-space"):
        ingest_files(file, bpe_tokenizer, tmp_path / "s", leading_space=True, messages_field="chat")
