"""A tokenizer with a padding token past the model's ids, as many Llama 2 have: checked before tokenization, and used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.data.tokenizer import load_tokenizer, vocabulary_size
from bico_ds.training import assembly
from tests.data.prepare.ingesting import TEXTS, ingest_files, write_jsonl

Opened = Callable[..., assembly.RunInputs]


@pytest.fixture
def padded(bpe_tokenizer: str, tmp_path: Path) -> Path:
    tokenizer = load_tokenizer(bpe_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "padded")
    return tmp_path / "padded"


@pytest.fixture
def opened(padded: Path, tmp_path: Path) -> Opened:
    def open_inputs(*texts: str, store: Path | None = None, lacking: int = 1) -> assembly.RunInputs:
        """Of a model that embeds `lacking` ids fewer than the tokenizer has."""
        file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        source = f"files: [{file}]" if store is None else f"store: {store}"
        overrides = {
            "model.tokenizer": padded,
            "model.config.vocab_size": vocabulary_size(load_tokenizer(padded)) - lacking,
            "data.sources": f"[{{{source}}}]",
            "data.cache_dir": tmp_path / "cache",
            "evaluation.tasks": "[]",
        }
        recipe = load_recipe("tiny_base", [f"{key}={value}" for key, value in overrides.items()])
        return assembly.open_inputs(recipe)

    return open_inputs


def test_it_is_taken_where_no_text_holds_the_padding_and_the_export_names_none(opened: Opened) -> None:
    inputs = opened(*TEXTS[:5])
    size = vocabulary_size(inputs.tokenizer)
    assert inputs.tokenizer.pad_token_id == inputs.vocabulary == size - 1
    assert len(inputs.stores[0]) == 5 and inputs.stores[0].manifest.max_token_id < size - 1
    config = LlamaConfig(vocab_size=size - 1, pad_token_id=None)
    assert any("Set tokenizer.pad_token" in line for line in assembly.export_warnings(inputs, config))
    of_all = LlamaConfig(vocab_size=size)
    assert not any("pad_token" in line for line in assembly.export_warnings(inputs, of_all))


def test_a_text_that_holds_it_is_refused_with_its_line(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:2: token id past the vocabulary: id \d+ \('<pad>'\)"):
        opened("fine", "a <pad> in it")
    assert opened("fine", "a <pad> in it", lacking=0).stores[0].manifest.documents == 2


def test_a_store_whose_texts_hold_it_is_refused(opened: Opened, padded: Path, tmp_path: Path) -> None:
    for name, text in (("good", "fine"), ("bad", "a <pad> in it")):
        ingest_files(write_jsonl(tmp_path / "b.jsonl", [{"text": text}]), str(padded), tmp_path / name)
    assert len(opened(store=tmp_path / "good").stores[0]) == 1
    with pytest.raises(UserError, match=r"bad' has a document with the token id .* --vocab-size"):
        opened(store=tmp_path / "bad")


def test_another_tokenizer_is_refused_before_a_text_is_tokenized(opened: Opened, tmp_path: Path) -> None:
    for lacking in (2, 300, -400):
        with pytest.raises(UserError, match="do not belong together"):
            opened("a <pad> in it", lacking=lacking)
    assert not list((tmp_path / "cache").glob("a-*"))
