"""Tokenizers: loaded exactly or refused, and named by what they do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bico_ds.common.errors import UserError
from bico_ds.config.sections.data import FactsSpec
from bico_ds.data.prepare.facts import write_facts
from bico_ds.data.tokenizer import load_tokenizer, tokenizer_hash


def test_a_bare_sentencepiece_model_tokenizes_as_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, twice a day.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        for text in ("The lazy fox  jumps.", "Größe 北京 🙂\nday"):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
        assert tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("a template")
    assert [load_tokenizer(path).chat_template for path in (tmp_path, tmp_path / "tokenizer.model")] == [
        "a template"
    ] * 2


def test_the_chat_template_is_the_one_that_transformers_takes_and_a_copy_has_it_too(
    tmp_path: Path, bpe_tokenizer: str
) -> None:
    """A file before `tokenizer_config.json`; several by their names; and all of them in whatever is saved again."""
    folder = Path(shutil.copytree(bpe_tokenizer, tmp_path / "t"))
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "of the config"}))
    wanted: list[str | dict[str, str]] = ["of the config"]
    (folder / "additional_chat_templates").mkdir()
    for number, (file, template) in enumerate(
        [
            ("chat_template.jinja", "of the file"),
            ("additional_chat_templates/rag.jinja", {"default": "of the file", "rag": "of the file"}),
        ]
    ):
        found = load_tokenizer(folder)
        assert found.chat_template == AutoTokenizer.from_pretrained(folder).chat_template == wanted[number]
        found.save_pretrained(tmp_path / f"copy-{number}")
        assert load_tokenizer(tmp_path / f"copy-{number}").chat_template == wanted[number]
        (folder / file).write_text("of the file")
        wanted.append(template)
    assert load_tokenizer(folder).chat_template == wanted[-1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer in"),
        ({"tokenizer.json": "{"}, "cannot load a tokenizer from"),
        ({"tokenizer.model": "no model"}, "cannot load a sentencepiece model"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_the_tokenizer_hash_names_what_the_tokenizer_does(tmp_path: Path) -> None:
    spec = FactsSpec(name_first=5, description_first=4, both=6)
    write_facts(spec, tmp_path / "a")
    write_facts(spec.model_copy(update={"both": 7}), tmp_path / "b")
    first, other = load_tokenizer(tmp_path / "a" / "tokenizer"), load_tokenizer(tmp_path / "b" / "tokenizer")
    assert tokenizer_hash(first) == tokenizer_hash(load_tokenizer(tmp_path / "a" / "tokenizer"))
    assert tokenizer_hash(first) != tokenizer_hash(other)
