"""`model.lora`: peft's own names and what is not supported are refused by what to write, and what a run exports follows."""

from __future__ import annotations

import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.sections.model import LoraSpec


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("r: 8", "this is peft's name, the key is 'rank' here"),
        ("lora_alpha: 8", "the key is 'alpha' here"),
        ("lora_dropout: 0.1", "the key is 'dropout' here"),
        ("target_modules: [q_proj]", "the key is 'targets' here"),
        ("use_rslora: true", "the key is 'rslora' here"),
        ("dora: true", "DoRA is not supported: "),
        ("use_dora: false", "DoRA is not supported: "),
        ("modules_to_save: [lm_head]", "no module is trained whole"),
        ("trainable_token_indices: [3]", "no module is trained whole"),
        ("bias: all", "biases belong to the base"),
        ("rslroa: true", "unknown key (did you mean 'rslora'?)"),
    ],
)
def test_a_key_of_peft_is_refused_at_its_line_with_what_to_write(tmp_path, key, told):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: smollm2_135m_bico\nmodel:\n  lora:\n    rank: 8\n    {key}\n")
    name = "r" if key.startswith("r:") else key.split(":")[0]
    with pytest.raises(UserError) as refused:
        load_recipe(str(recipe))
    first, *others = str(refused.value).splitlines()
    assert first.startswith(f"{recipe}:5: model.lora.{name}: ") and told in first and not others


def test_adapters_are_scaled_as_before_where_nothing_is_said():
    assert LoraSpec().rslora is False


@pytest.mark.parametrize(
    ("overrides", "exports_adapters"),
    [
        (["model.lora=null"], False),
        ([], True),
        (["checkpoint.merge_adapters=true"], False),
        (["model.path=null", "model.config={model_type: llama}"], False),  # a random base is in no file
    ],
)
def test_what_a_run_exports_is_said_by_its_recipe(overrides, exports_adapters):
    assert load_recipe("smollm2_135m_bico_lora", overrides).exports_adapters is exports_adapters


def test_a_merge_of_adapters_that_are_not_there_is_refused():
    with pytest.raises(UserError, match="checkpoint.merge_adapters: there are no adapters to merge"):
        load_recipe("smollm2_135m_bico", ["checkpoint.merge_adapters=true"])
