"""Mistakes in a recipe's model section end in one message that names the key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
from transformers import AutoConfig, GenerationConfig, LlamaConfig

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.architecture import adopt_special_tokens, first_layers, id_list, meta_model, model_config
from bico_ds.model.families import FAMILIES


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
    with pytest.raises(UserError, match=r"unknown model type '\['llama'\]'"):
        model_config(ModelSpec(config={"model_type": ["llama"]}))


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "mamba", "qwen2_moe", "t5"])
def test_a_foreign_model_type_is_refused_as_such_whatever_its_config_holds(tmp_path, model_type):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    for spec in (ModelSpec(path=str(tmp_path)), ModelSpec(config={"model_type": model_type})):
        with pytest.raises(UserError, match=f"^model type '{model_type}' is not supported: .* llama, "):
            model_config(spec)


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


class _PaddedTokenizer(_Tokenizer):
    pad_token_id = 64


def test_a_padding_token_that_the_model_does_not_embed_is_none_of_its_config():
    config = LlamaConfig(vocab_size=64)
    generation = GenerationConfig.from_model_config(config)
    adopt_special_tokens(_PaddedTokenizer(), config, generation)
    assert config.pad_token_id is None and generation.pad_token_id is None


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
OLD_YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "high_freq_factor": 4.0,
}
IMPOSSIBLE = [
    ({"num_hidden_layers": 0}, "num_hidden_layers: must be at least 1, found 0: a model without layers learns nothing"),
    ({"num_hidden_layers": -3}, "num_hidden_layers: must be at least 1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: must be at most"),
    ({"num_hidden_layers": True}, "num_hidden_layers: must be a number"),
    ({"hidden_size": 0}, "hidden_size: must be at least 1"),
    ({"hidden_size": 10**18}, "hidden_size: must be at most"),
    ({"intermediate_size": 0}, "intermediate_size: must be at least 1"),
    ({"vocab_size": 0}, "vocab_size: must be at least 1"),
    ({"num_attention_heads": 0}, "num_attention_heads: must be at least 1"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: must divide num_attention_heads \\(4\\)"),
    ({"num_key_value_heads": 5}, "num_key_value_heads: must divide num_attention_heads \\(4\\)"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: must be at least 1"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps: must be greater than 0"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps: must be a finite number"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps: must be a finite number"),
    ({"max_position_embeddings": 0}, "max_position_embeddings: must be at least 1"),
    ({"rope_theta": 0.0}, "rope_theta: must be greater than 1"),
    ({"rope_theta": math.inf}, "rope_theta: must be a finite number"),
    ({"rope_theta": "10000"}, "rope_theta: must be a number, found '10000'"),
    ({"rope_theta": [10000.0]}, "rope_theta: must be a number"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -3.0}}, "rope_parameters.rope_theta: must be greater"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor: must be at least 1"),
    ({"rope_scaling": {"rope_type": "linear", "factor": math.inf}}, "rope_scaling.factor: must be a finite number"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor: must be a number, found '2'"),
    ({"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}},
     "rope_theta: must be as rope_parameters.rope_theta \\(7000.0\\), found 500.0"),
    ({"rope_scaling": {**YARN, "factor": 4.0}, "rope_parameters": {**YARN, "rope_theta": 1e4}},
     "rope_scaling.factor: must be as rope_parameters.factor \\(2.0\\), found 4.0"),
    ({"rope_scaling": {**OLD_YARN}, "rope_parameters": {**YARN, "rope_theta": 1e6}},
     "rope_theta, left out beside rope_scaling: must be as rope_parameters.rope_theta \\(1000000.0\\), found 10000.0"),
    ({"rope_theta": 1e6, "rope_scaling": {**OLD_YARN}, "rope_parameters": {"rope_type": "default"}},
     "rope_scaling.rope_type: must be as rope_parameters.rope_type \\('default'\\), found 'yarn'"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type: is missing beside a factor"),
    ({"rope_scaling": {**YARN, "attention_factor": 0.0}}, "rope_scaling.attention_factor: must be greater than 0"),
    ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 32}}, "rope_scaling.beta_slow: must be less than beta_fast"),
    ({"rope_scaling": {**YARN, "beta_slow": 40}}, "rope_scaling.beta_slow: must be less than beta_fast \\(32\\)"),
    ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, "rope_scaling.beta_slow: must be less than beta_fast \\(0.5\\)"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "rope_scaling.low_freq_factor: must be less than high_freq"),
    ({"rope_scaling": {"rope_type": "lineer", "factor": 2.0}},
     "rope_scaling.rope_type: unknown type of rotary embedding 'lineer' \\(did you mean 'linear'\\?\\); known: default,"),
    ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling.type: unknown type of rotary embedding 'ntk'; known: "),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters.rope_type: unknown type .* \\['yarn'\\]"),
    ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope_scaling.rope_type: unknown type of rotary embedding None"),
    ({"rope_scaling": {"rope_type": "linear"}},
     "rope_scaling.factor: is missing, and a rotary embedding of type 'linear' is not defined without it"),
    ({"rope_scaling": {"type": "dynamic", "factor": None}}, "rope_scaling.factor: is missing, .* of type 'dynamic'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor: is missing, .* of type 'yarn'"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.short_factor: is missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor: is missing"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "rope_scaling.factor: must be at least 1, found 0"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": math.nan}}, "rope_scaling.factor: must be a finite number"),
    ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling.rope_type: is 'default' beside a factor"),
    ({"rope_scaling": {**YARN, "truncate": "no"}}, "rope_scaling.truncate: must be true or false, found 'no'"),
    ({"rope_scaling": {**YARN, "rope_theta": None}}, "rope_scaling.rope_theta: must be a number, found null"),
    ({"rope_parameters": {"full_attention": YARN}}, "rope_parameters.full_attention: rotations by the type of a layer"),
    ({"rope_scaling": "linear"}, "rope_scaling: must be a mapping with a rope_type, .* found 'linear'"),
    ({"rope_scaling": ["linear", 2.0]}, "rope_scaling: must be a mapping with a rope_type"),
    ({"rope_scaling": ""}, "rope_scaling: must be a mapping with a rope_type"),
    ({"rope_parameters": False}, "rope_parameters: must be a mapping with a rope_type"),
    ({"hidden_act": "silo"}, "hidden_act: unknown activation 'silo' \\(did you mean 'silu'\\?\\)"),
    ({"hidden_act": ["silu"]}, "hidden_act: unknown activation"),
    ({"pad_token_id": 64}, "pad_token_id: must be less than vocab_size \\(64\\)"),
]  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("values", "message"), IMPOSSIBLE)
def test_what_makes_no_model_is_refused_by_its_key_in_a_recipe_and_in_a_folder(
    tmp_path, model_type, values, message
):
    config = {**SMALL, "model_type": model_type, **values}
    with pytest.raises(UserError, match=rf"^model\.config\.{message}"):
        model_config(ModelSpec(config=config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"^model\.path: {tmp_path}/config\.json: {message}"):
        model_config(ModelSpec(path=str(tmp_path)))


def test_random_weights_of_zero_are_refused_and_a_folder_s_are_not_drawn(tmp_path):
    config = {**SMALL, "model_type": "llama", "initializer_range": 0.0}
    with pytest.raises(
        UserError, match="initializer_range: must be at least 1e-06, found 0.0: .* learn nothing"
    ):
        model_config(ModelSpec(config=config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_config(ModelSpec(path=str(tmp_path))).initializer_range == 0.0


def test_heads_without_a_size_of_their_own_divide_the_hidden_size():
    with pytest.raises(UserError, match=r"hidden_size: must be a multiple of num_attention_heads \(3\)"):
        model_config(
            ModelSpec(
                config={**SMALL, "model_type": "qwen2", "num_attention_heads": 3, "num_key_value_heads": 3}
            )
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [("quantization_config", {"quant_method": "fp8"}), ("transformers_weights", "other.safetensors")],
)
def test_a_folder_whose_config_points_to_other_weights_is_refused(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "llama", key: value}))
    with pytest.raises(UserError, match=f"config.json: {key}: "):
        model_config(ModelSpec(path=str(tmp_path)))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_layer_stands_for_all(model_type):
    config = model_config(ModelSpec(config={**SMALL, "model_type": model_type, "num_hidden_layers": 5}))
    whole, first = (meta_model(c).model.layers for c in (config, first_layers(config)))
    assert len(whole) == config.num_hidden_layers == 5 and len(first) == 1
    shapes = [{name: p.shape for name, p in layers[-1].named_parameters()} for layers in (whole, first)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("key", "value"), [("attn_implementation", 2), ("base_model_tp_plan", 2), ("base_model_tp_plan", "a/b")]
)
def test_a_key_that_transformers_takes_as_it_comes_is_refused_where_it_makes_no_model(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "llama", key: value}))
    with pytest.raises(UserError, match="makes no model"):
        meta_model(model_config(ModelSpec(path=str(tmp_path))))


@pytest.mark.parametrize(("ids", "stops"), [(-1, []), ([2, -1, 5], [2, 5]), (None, []), (0, [0])])
def test_minus_one_is_no_token(ids, stops):
    assert id_list(ids) == stops
