"""Mistakes in a recipe's model section end in one message that names the key."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from transformers import GenerationConfig, LlamaConfig

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.model.architecture import adopt_special_tokens, model_config


def test_a_models_folder_that_nobody_fetched_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = load_recipe("llama70b_bico").model
    with pytest.raises(
        UserError, match=r"model\.path: the folder 'models/llama-3.1-70b' does not exist; fetch"
    ):
        model_config(spec)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.config.num_attention_heads=3", "not a multiple of the number of attention heads"),
        ("model.config.hidden_size=abc", "'hidden_size' expected int, got str"),
        ("model.config.rope_scaling=7", "expected dict, got int"),
        ("model.config.num_attention_heads=0", ""),
    ],
)
def test_values_that_make_no_model_are_refused_by_their_key(override, words):
    with pytest.raises(UserError, match=rf"^model\.config: .*{words}"):
        model_config(load_recipe("tiny_base", [override]).model)


def test_a_broken_config_file_is_refused_by_its_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "abc"}')
    with pytest.raises(UserError, match=r"^model\.path: cannot read the config of .*hidden_size"):
        model_config(load_recipe("tiny_base", [f"model.path={tmp_path}", "model.config=null"]).model)


def test_an_unknown_model_type_is_refused_with_those_that_can_be_trained():
    with pytest.raises(
        UserError, match=r"unknown model type 'lama' \(did you mean 'llama'\?\); supported: llama, "
    ):
        model_config(load_recipe("tiny_base", ["model.config.model_type=lama"]).model)


@dataclass(frozen=True)
class _Tokenizer:
    """As `ModelTokenizer`: EOS is 2."""

    special_ids: frozenset[int] = frozenset({0, 1, 2, 5, 6})
    bos_token_id = 1
    eos_token_id = 2
    pad_token_id = 0

    def save_pretrained(self, save_directory: object) -> None: ...


@pytest.mark.parametrize(
    ("of_base", "expected"),
    [
        (2, 2),
        (1, 2),
        (None, 2),
        ([2], 2),
        ([5, 6], 2),
        ([6, 2, 5], [6, 2, 5]),
        ([2, 5, 77], [2, 5]),
        ([2, 77], 2),
    ],
)
def test_a_model_stops_at_its_tokenizers_eos_and_at_what_its_base_stops_at_beside_that(of_base, expected):
    config = LlamaConfig(bos_token_id=7, eos_token_id=of_base, pad_token_id=9)
    generation = GenerationConfig.from_model_config(config)
    adopt_special_tokens(_Tokenizer(), config, generation)
    for settings in (config, generation):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, expected, 0)
