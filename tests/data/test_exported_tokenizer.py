"""Tokenizers as exports carry them: BOS as in training, never EOS, and nothing that transformers 5 alone can read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from bico_ds.config.sections.data import FactsSpec
from bico_ds.data.exported_tokenizer import ExportedTokenizer, adds_bos, misreading, save_tokenizer
from bico_ds.data.prepare.facts import write_facts
from bico_ds.data.tokenizer import load_tokenizer, tokenizer_digest, tokenizer_hash
from tests.data.tokenizer_kinds import BOS, CONFIGS, EOS, POST_PROCESSORS, write_kinds

OTHERS = ("prefix", "cut", "nfc", "llama2", "words")
KINDS = (*POST_PROCESSORS, *CONFIGS, *OTHERS)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    assert {path.name for path in write_kinds(root)} == set(KINDS)
    return root


def texts() -> list[str]:
    draw = random.Random()
    letters = "  abc xyz.,'!?</s>Größe北京🙂\n\t0123"
    return ["".join(draw.choices(letters, k=draw.randint(1, 40))) + "q" for _ in range(20)]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_tokenizer_adds_bos_as_asked_never_eos_and_else_nothing(kinds, kind, add_bos, tmp_path):
    original = load_tokenizer(kinds / kind)
    add_bos = add_bos and original.bos_token_id is not None
    ExportedTokenizer(original, add_bos).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        plain = original(text, add_special_tokens=False)["input_ids"]
        assert loaded(text)["input_ids"] == [BOS] * add_bos + plain
        assert loaded(text, add_special_tokens=False)["input_ids"] == plain
        assert loaded.decode(plain) == original.decode(plain)
    assert adds_bos(loaded) == add_bos
    flags = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (flags["add_bos_token"], flags["add_eos_token"]) == (add_bos, False)
    assert tokenizer_hash(loaded) == tokenizer_hash(original), "a store of one is a store of the other"
    for chat in (True, False):
        assert tokenizer_digest(loaded, chat=chat) == tokenizer_digest(original, chat=chat), "and a cache too"


@pytest.mark.parametrize("kind", [kind for kind in POST_PROCESSORS if kind != "roberta"])
def test_offsets_stay_those_of_the_tokenizer(kinds, kind, tmp_path):
    """RoBERTa's processor, which no decoder has, also trims offsets, and goes as a whole."""
    original = load_tokenizer(kinds / kind)
    ExportedTokenizer(original, True).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in texts():
        plain = original(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert (
            loaded(text, add_special_tokens=True, return_offsets_mapping=True)["offset_mapping"][1:] == plain
        )


@pytest.mark.parametrize("bos", ["<a b>", "<a:0>", "$A", "<｜begin▁of｜>"])
def test_a_bos_of_any_name_can_be_added(kinds, bos, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(kinds / "bytes", bos_token=bos)
    ExportedTokenizer(tokenizer, True).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    plain = loaded("x y", add_special_tokens=False)["input_ids"]
    assert loaded("x y")["input_ids"] == [tokenizer.convert_tokens_to_ids(bos), *plain]
    assert loaded.bos_token == bos


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_has_no_trace_of_transformers_5_or_of_this_machine(kinds, kind, add_bos, tmp_path):
    original = load_tokenizer(kinds / kind)
    if original.bos_token_id is None and add_bos:
        return
    save_tokenizer(original, tmp_path, add_bos=add_bos)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only", "name_or_path", "vocab_file"} & set(config)
    assert not isinstance(config.get("extra_special_tokens"), list)
    for file in tmp_path.rglob("*.json"):
        assert str(kinds.parent) not in file.read_text()
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    assert rules["truncation"] is None and rules["padding"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_saving_again_changes_no_byte(kinds, kind, tmp_path):
    original = load_tokenizer(kinds / kind)
    add_bos = original.bos_token_id is not None
    save_tokenizer(original, tmp_path / "plain")
    save_tokenizer(original, tmp_path / "live", add_bos=add_bos)
    save_tokenizer(load_tokenizer(tmp_path / "plain"), tmp_path / "later", add_bos=add_bos)
    content = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "live", tmp_path / "later")
    ]
    assert content[0] == content[1]


def test_more_special_tokens_keep_the_name_that_transformers_4_knows(kinds, tmp_path):
    for kind in ("more_tokens", "named_tokens"):
        save_tokenizer(load_tokenizer(kinds / kind), tmp_path / kind)
    more = json.loads((tmp_path / "more_tokens" / "tokenizer_config.json").read_text())
    assert more["additional_special_tokens"] == ["<|eot|>", "<|new|>"]
    named = json.loads((tmp_path / "named_tokens" / "tokenizer_config.json").read_text())
    assert named["extra_special_tokens"] == {"image_token": "<|eot|>"}
    assert AutoTokenizer.from_pretrained(tmp_path / "named_tokens").image_token == "<|eot|>"


def test_a_space_in_front_is_what_the_rules_say_where_transformers_4_would_change_them(kinds, tmp_path):
    for kind, expected in (("prefix", True), ("wrong_prefix", False), ("none", False)):
        save_tokenizer(load_tokenizer(kinds / kind), tmp_path / kind)
        config = json.loads((tmp_path / kind / "tokenizer_config.json").read_text())
        assert config["add_prefix_space"] == expected


def test_a_tokenizer_that_transformers_reads_by_another_class_beside_a_model_is_named(kinds, tmp_path):
    """A qwen2 model gets `Qwen2Tokenizer` in transformers 5, whatever its files say."""
    words = ExportedTokenizer(load_tokenizer(kinds / "words"), True)
    assert misreading(words, LlamaConfig()) is None
    warning = misreading(words, Qwen2Config())
    assert warning is not None and "Qwen2Tokenizer" in warning
    assert misreading(ExportedTokenizer(load_tokenizer(kinds / "qwen_class"), False), Qwen2Config()) is None


def test_our_programs_read_such_a_tokenizer_by_its_own_rules(kinds, tmp_path):
    original = load_tokenizer(kinds / "words")
    save_tokenizer(original, tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(original)


def test_the_embedded_tasks_tokenizer_can_be_read_by_transformers_4(tmp_path):
    write_facts(FactsSpec(name_first=2, description_first=2, both=2), tmp_path)
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(tmp_path / "tokenizer").eos_token_id == EOS
