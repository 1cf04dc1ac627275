"""The architecture of a run, from config.json or from the recipe; where both have it, they must agree."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.bounds import Bound
from bico_ds.config.paths import FolderOrHub
from bico_ds.config.schema import ModelSpec
from bico_ds.model.families import FAMILIES

# What makes two configs different networks; everything else in a config.json is bookkeeping.
_ARCHITECTURE_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias", "max_position_embeddings",
    "sliding_window",
)  # fmt: skip
# Keys of published config.json files that transformers reads but does not list among its attributes.
_LEGACY_KEYS = ("rope_theta", "rope_scaling", "torch_dtype", "pretraining_tp", "rope_interleaved")
# The numbers of a config that transformers takes as they come; it warns of some and builds the model all the same.
_BOUNDS = {
    "vocab_size": Bound(least=1, most=2**31 - 1, why="it is the number of token ids"),
    "hidden_size": Bound(least=1, most=2**20, why="it is the width of the hidden states"),
    "intermediate_size": Bound(least=1, most=2**24, why="it is the width of the MLPs"),
    "num_hidden_layers": Bound(least=1, most=10_000, why="a model without layers learns nothing"),
    "num_attention_heads": Bound(least=1, most=2**16, why="attention without heads mixes nothing"),
    "num_key_value_heads": Bound(least=1, most=2**16, why="each serves the same number of query heads"),
    "head_dim": Bound(least=2, most=2**16, why="rotations turn its dimensions in pairs"),
    "max_position_embeddings": Bound(least=1, most=2**31 - 1, why="it is the model's context in tokens"),
    "sliding_window": Bound(least=1, most=2**31 - 1, why="a token attends to itself at least"),
    "rms_norm_eps": Bound(above=0, most=0.1, why="norms divide by the root of a mean square plus this"),
    "initializer_range": Bound(least=0, most=1, why="it is the deviation of random weights"),
    "rope_theta": Bound(above=1, most=1e15, why="rotations become slower by powers of it"),
    "partial_rotary_factor": Bound(least=1, most=1, why="the families here rotate all dimensions"),
}
# Of `rope_scaling`, or `rope_parameters`.
_ROPE_BOUNDS = {
    "rope_theta": _BOUNDS["rope_theta"],
    "partial_rotary_factor": _BOUNDS["partial_rotary_factor"],
    "factor": Bound(least=1, most=1e6, why="it says how many times as long the context becomes"),
    "original_max_position_embeddings": _BOUNDS["max_position_embeddings"],
    "low_freq_factor": Bound(above=0, most=1e6, why="it divides the original context"),
    "high_freq_factor": Bound(above=0, most=1e6, why="it divides the original context"),
    "beta_fast": Bound(above=0, most=1e6, why="it is a number of rotations"),
    "beta_slow": Bound(above=0, most=1e6, why="it is a number of rotations"),
    "attention_factor": Bound(above=0, most=1e3, why="queries and keys are multiplied by it"),
    "mscale": Bound(least=0, most=1e3, why="it scales queries and keys"),
    "mscale_all_dim": Bound(least=0, most=1e3, why="it scales queries and keys"),
}
# Of weights that are drawn.
_RANDOM_RANGE = Bound(
    least=1e-6, most=1, why="it is the deviation of random weights, and weights of 0 learn nothing"
)
# Keys of a folder's config.json that would make transformers read other weights than `weights/load.py` does.
_FOREIGN_WEIGHTS = {
    "quantization_config": "the weights are quantized, and training needs BF16, F16 or F32 ones",
    "transformers_weights": "it names a file of weights; give that file one of the usual names (model.safetensors)",
}
# What transformers raises on values that make no model.
_BAD_VALUES = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# Models pad their vocabulary a little; more missing ids mean another tokenizer.
_SMALLEST_VOCABULARY_SHARE = 0.9


class ModelTokenizer(Protocol):
    """What a model and its export use of a tokenizer of transformers."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    def save_pretrained(self, save_directory: str | Path) -> Any: ...


def model_config(spec: ModelSpec) -> PretrainedConfig:
    """The architecture that `spec` asks for: the config.json at `path`, or `config`.

    Raises `UserError` on a missing folder, a config that cannot be read, unknown keys, values that make no model, and where
    `path` and `config` are both given and disagree.
    """
    recipe = None if spec.config is None else _config_from_recipe(spec.config)
    config = recipe if spec.path is None else _config_at(spec.path.here())
    assert config is not None, "ModelSpec guarantees a path or a config"
    if recipe is not None and config is not recipe:
        _require_same_architecture(config, recipe, str(spec.path))
    if spec.path is None and (problem := _RANDOM_RANGE.problem(config.initializer_range)) is not None:
        raise UserError(f"model.config.initializer_range: {problem}")
    config.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.dtype]
    return config


def first_layers(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of `config` with one decoder layer: all are alike, and a check of their shapes needs no more."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    if getattr(one, "layer_types", None):
        one.layer_types = one.layer_types[:1]
    return one


def parameter_count(config: PretrainedConfig) -> int:
    """Parameters of this architecture, a tied head counted once. Needs no memory for them."""
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The Hugging Face causal LM of this architecture on the meta device: shapes without memory."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    return model


def check_vocabulary(config: PretrainedConfig, tokenizer_size: int, *, tokenizer: str) -> None:
    """Raise `UserError` if a tokenizer of `tokenizer_size` ids cannot belong to this model."""
    if not _SMALLEST_VOCABULARY_SHARE * config.vocab_size <= tokenizer_size <= config.vocab_size:
        raise UserError(
            f"the tokenizer at '{tokenizer}' has {tokenizer_size} ids, the model {config.vocab_size}: they "
            "do not belong together. Set 'model.tokenizer' to the tokenizer the model was trained with."
        )


def adopt_special_tokens(tokenizer: ModelTokenizer, *settings: Any) -> None:
    """Give a model from random weights its tokenizer's ids that begin, end and pad a text.

    `settings`: the model's config and generation config, which are changed.
    """
    for config in settings:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def check_values(values: Mapping[str, Any], *, where: str) -> None:
    """Raise `UserError` where the values of a config.json make no model; `where` comes before their keys.

    A key that is left out, or null, has the family's default. Values of another type transformers refuses.
    """
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    problems = _out_of_bounds(numbers, _BOUNDS)
    for section in ("rope_scaling", "rope_parameters"):
        if isinstance(values.get(section), Mapping):
            problems += [f"{section}.{problem}" for problem in _wrong_rotation(values[section])]
    activation = values.get("hidden_act")
    if activation is not None and activation not in ACT2FN:
        problems.append(
            f"hidden_act: unknown activation '{activation}'{did_you_mean(str(activation), ACT2FN)}"
        )
    if problems:
        raise UserError("\n".join(f"{where}{problem}" for problem in problems))


def check_shapes(config: PretrainedConfig, *, where: str) -> None:
    """Raise `UserError` where the sizes of a config do not go together; `where` comes before their keys."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % key_heads:
        raise UserError(
            f"{where}num_key_value_heads: must divide num_attention_heads ({heads}): each serves the same number of "
            f"query heads (found {key_heads})"
        )
    if getattr(config, "head_dim", None) is None and hidden % heads:
        raise UserError(
            f"{where}hidden_size: must be a multiple of num_attention_heads ({heads}) where there is no head_dim "
            f"(found {hidden})"
        )
    padding = getattr(config, "pad_token_id", None)
    if padding is not None and not -config.vocab_size <= padding < config.vocab_size:
        raise UserError(
            f"{where}pad_token_id: must be less than vocab_size ({config.vocab_size}) (found {padding})"
        )


def _out_of_bounds(values: Mapping[str, Any], bounds: Mapping[str, Bound]) -> list[str]:
    given = {key: values[key] for key in bounds if values.get(key) is not None}
    problems = {key: bounds[key].problem(value) for key, value in given.items()}
    return [f"{key}: {problem}" for key, problem in problems.items() if problem is not None]


def _wrong_rotation(rope: Mapping[str, Any]) -> list[str]:
    """What is wrong with `rope_scaling` or `rope_parameters`, of which transformers only warns."""
    if problems := _out_of_bounds(rope, _ROPE_BOUNDS):
        return problems
    return [
        f"{low}: must be less than {high} ({rope[high]}) (found {rope[low]})"
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))
        if None not in (rope.get(low), rope.get(high)) and rope[low] >= rope[high]
    ]


def _config_at(path: FolderOrHub) -> PretrainedConfig:
    if isinstance(path, Path) and not (path / "config.json").is_file():
        if not path.is_dir():
            raise UserError(
                f"model.path: the folder '{path}' does not exist; fetch the model there, "
                "or give a hub name (owner/name)"
            )
        raise UserError(
            f"model.path: the folder '{path}' has no config.json; give a folder with config.json and *.safetensors"
        )
    where = f"model.path: {path}/config.json: "
    try:
        values, _ = PretrainedConfig.get_config_dict(str(path))
        check_values(values, where=where)
        config = AutoConfig.from_pretrained(str(path))
    except UserError:
        raise
    except (OSError, *_BAD_VALUES) as error:
        raise UserError(f"model.path: cannot read the config of '{path}': {_one_line(error)}") from error
    for key, reason in _FOREIGN_WEIGHTS.items():
        if values.get(key) is not None:
            raise UserError(f"{where}{key}: {reason}")
    check_shapes(config, where=where)
    return config


def _config_from_recipe(values: dict[str, Any]) -> PretrainedConfig:
    values = dict(values)
    model_type = values.pop("model_type", "llama")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, FAMILIES)
        raise UserError(
            f"model.config.model_type: unknown model type '{model_type}'{hint}; supported: {', '.join(FAMILIES)}"
        )
    known = {*CONFIG_MAPPING[model_type]().to_dict(), *_LEGACY_KEYS}
    for key in values:
        if key not in known:
            raise UserError(
                f"model.config.{key}: {model_type} models have no such key{did_you_mean(key, known)}"
            )
    check_values(values, where="model.config.")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except _BAD_VALUES as error:
        raise UserError(f"model.config: {_one_line(error)}") from error
    check_shapes(config, where="model.config.")
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _require_same_architecture(found: PretrainedConfig, wanted: PretrainedConfig, path: str) -> None:
    differences = [
        f"{key}: {getattr(found, key, None)!r} at the path, {getattr(wanted, key, None)!r} in the recipe"
        for key in _ARCHITECTURE_KEYS
        if getattr(found, key, None) != getattr(wanted, key, None)
    ]
    if differences:
        raise UserError(
            f"the model at '{path}' is not the one 'model.config' describes:\n  " + "\n  ".join(differences)
        )
