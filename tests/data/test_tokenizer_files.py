"""Tokenizers of strangers: whatever is in their files, they load, or one message names the folder; nothing ends later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from bico_ds.common.errors import UserError
from bico_ds.data.tokenizer import load_tokenizer, tokenizer_hash, vocabulary_size, word_boundaries
from tests.cpu_time import cpu_seconds_below
from tests.damaged_files import damaged


@pytest.fixture
def folder(bpe_tokenizer: str, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(bpe_tokenizer, tmp_path / "t"))
    (copy / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    (copy / "added_tokens.json").write_text("{}")
    return copy


def _use(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer_hash(tokenizer)
    word_boundaries(tokenizer)


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


WRONG: list[tuple[str, Any]] = [
    ("model_max_length", "4096"),
    ("model_max_length", {}),
    ("model_max_length", True),
    ("model_max_length", -1),
    ("bos_token", 5),
    ("eos_token", ["</s>"]),
    ("pad_token", {"content": 7}),
    ("chat_template", 7),
    ("chat_template", [{"name": "default"}]),
    ("chat_template", ["a"]),
    ("added_tokens_decoder", []),
    ("added_tokens_decoder", {"-1": {"content": "x"}}),
    ("added_tokens_decoder", {"99999999999": {"content": "x"}}),
    ("added_tokens_decoder", {"x": {"content": "x"}}),
    ("added_tokens_decoder", {"5": 3}),
    ("additional_special_tokens", "abc"),
    ("extra_special_tokens", [5]),
    ("tokenizer_class", ["x"]),
    ("padding_side", 1),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: repr(value)[:30])
def test_a_value_of_another_type_is_named_with_file_and_key(folder: Path, key: str, value: Any) -> None:
    _change(folder / "tokenizer_config.json", **{key: value})
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert "tokenizer_config.json" in str(caught.value) and key in str(caught.value)
    assert "fetch the tokenizer again" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"", "cannot be read: empty"),
        ("tokenizer_config.json", b"[]", "holds a list, not an object"),
        ("tokenizer_config.json", b'{"a":' * 50_000, "nested deeper"),
        ("tokenizer_config.json", b'{"model_max_length": NaN}', "NaN"),
        ("special_tokens_map.json", b'{"bos_token": "<s', "not valid JSON"),
        ("added_tokens.json", b'{"x": -1}', "must have the id of a token"),
        ("added_tokens.json", b'{"x": 4000000000}', "must have the id of a token"),
        ("chat_template.jinja", b"\xff", "no UTF-8 text"),
        ("chat_template.jinja", b"x" * (1 << 21), "larger than"),
        ("tokenizer.json", b'{"model": ' + b"[" * 50_000, "cannot load a tokenizer"),
        ("tokenizer.json", b"", "cannot load a tokenizer"),
        ("tokenizer.model", b"\x0a\xff", "cannot load a tokenizer"),
    ],
)
def test_a_file_that_cannot_be_a_tokenizers_is_named(
    folder: Path, name: str, content: bytes, message: str
) -> None:
    if name == "tokenizer.model":
        (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


def test_an_id_that_no_table_can_hold_is_refused_at_once(folder: Path) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["vocab"]["far"] = 4_000_000_000
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(UserError, match="has ids up to 4,000,000,000"):
        load_tokenizer(folder)


@pytest.mark.parametrize("prefix", ["x", "x" * 5000])
def test_a_prefix_that_merges_have_not_is_refused_before_tokenizers_aborts_the_process(
    folder: Path, prefix: str
) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    _change(folder / "tokenizer.json", model=rules["model"] | {"continuing_subword_prefix": prefix})
    with pytest.raises(
        UserError, match=r"tokenizer\.json': model\.continuing_subword_prefix is 'xx*'?, which"
    ):
        load_tokenizer(folder)


def test_merges_that_have_their_prefix_load(folder: Path) -> None:
    rules = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>", "<unk>"], continuing_subword_prefix="##", show_progress=False
    )
    rules.train_from_iterator(["über über überall"], trainer)
    rules.save(str(folder / "tokenizer.json"))
    assert "##" in (folder / "tokenizer.json").read_text()
    assert load_tokenizer(folder).tokenize("überall") == rules.encode("überall").tokens


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"]
)
def test_a_damaged_file_loads_or_is_refused_within_a_second(folder: Path, name: str) -> None:
    _use(folder)
    rng, content = np.random.default_rng(), (folder / name).read_bytes()
    forms = list(damaged(content, count=40 if name == "tokenizer.json" else 120))
    refused = 0
    for form in forms if len(forms) < 60 else [forms[i] for i in rng.permutation(len(forms))[:60]]:
        (folder / name).write_bytes(form)
        with cpu_seconds_below(1, form[:200]):
            try:
                _use(folder)
            except UserError:
                refused += 1
    assert refused


def test_a_padding_token_is_counted_only_where_the_model_embeds_it(folder: Path) -> None:
    from bico_ds.data.tokenizer import needed_vocabulary

    plain = load_tokenizer(folder)
    size = vocabulary_size(plain)
    assert needed_vocabulary(plain, size) == needed_vocabulary(plain, size + 9) == size
    assert needed_vocabulary(plain, size - 1) == size  # an ordinary token is past it
    plain.add_special_tokens({"pad_token": "<pad>"})
    assert vocabulary_size(plain) == size + 1
    assert [needed_vocabulary(plain, n) for n in (size, size + 1, size - 1)] == [size, size + 1, size + 1]
    plain.add_tokens(["ordinary"])
    assert needed_vocabulary(plain, size) == size + 2
