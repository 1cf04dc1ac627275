"""Mistakes in a recipe's model section end in one message that names the key."""

from __future__ import annotations

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.model.architecture import model_config


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
