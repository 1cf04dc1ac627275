"""The architecture of a run, from config.json or from the recipe; where both have it, they must agree."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.bounds import Bound
from bico_ds.config.paths import FolderOrHub
from bico_ds.config.sections.model import ModelSpec
from bico_ds.model.config_values import check_shapes, check_values
from bico_ds.model.families import FAMILIES, family_of
from bico_ds.model.model_folder import CONFIG, one_line, read_config, readable

# What makes two configs different networks; everything else in a config.json is bookkeeping.
_ARCHITECTURE_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias", "max_position_embeddings",
    "sliding_window",
)  # fmt: skip
# Keys of published config.json files that transformers reads but does not list among its attributes.
_LEGACY_KEYS = ("rope_theta", "rope_scaling", "torch_dtype", "pretraining_tp", "rope_interleaved")
# Of weights that are drawn.
_RANDOM_RANGE = Bound(
    least=1e-6, most=1, why="it is the deviation of random weights, and weights of 0 learn nothing"
)
# What transformers raises on values that make no model.
_BAD_VALUES = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# Models pad their vocabulary a little; more missing ids mean another tokenizer.
_SMALLEST_VOCABULARY_SHARE = 0.9


class ModelTokenizer(Protocol):
    """What a model and its export use of a tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def save_pretrained(self, save_directory: str | Path) -> Any: ...


def with_own_config(spec: ModelSpec) -> ModelSpec:
    """The spec with what `model_config` finds as its `config`, and no `path`: a plan then reads neither folder nor hub."""
    return spec.model_copy(update={"path": None, "config": model_config(spec).to_dict()})


def model_config(spec: ModelSpec) -> PretrainedConfig:
    """The architecture that `spec` asks for: the config.json at `path`, or `config`.

    Raises `UserError` on a missing folder, a config that cannot be read, other model types than `FAMILIES`, unknown keys,
    values that make no model, and where `path` and `config` are both given and disagree.
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
    """The Hugging Face causal LM of this architecture on the meta device: shapes without memory.

    Raises `UserError` where transformers makes no model of the config: it takes keys of its own as they come.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=False)
    except _BAD_VALUES as error:
        raise UserError(
            f"the model's config makes no model ({one_line(error)}): remove the keys that are not of its architecture"
        ) from error
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    return model


def check_vocabulary(vocab_size: int, tokenizer_size: int, *, tokenizer: str) -> None:
    """Raise `UserError` if a tokenizer of which texts need `tokenizer_size` ids cannot belong to a model of `vocab_size`."""
    if not _SMALLEST_VOCABULARY_SHARE * vocab_size <= tokenizer_size <= vocab_size:
        past = ""
        if vocab_size < tokenizer_size < vocab_size / _SMALLEST_VOCABULARY_SHARE:
            past = (
                f", or take the tokens from id {vocab_size} on out of this one: only special tokens that no text "
                "needs, such as padding, may be past the model's ids"
            )
        raise UserError(
            f"the tokenizer at '{tokenizer}' has {tokenizer_size} ids, the model {vocab_size}: they "
            f"do not belong together. Set 'model.tokenizer' to the tokenizer the model was trained with{past}."
        )


def adopt_special_tokens(
    tokenizer: ModelTokenizer, config: PretrainedConfig, generation: GenerationConfig
) -> None:
    """Give a model's config and generation config its tokenizer's ids that begin, end and pad a text.

    Where the generation config stops at the tokenizer's EOS among other tokens, as Llama 3's does, those others stay which
    are special tokens of this tokenizer; where it does not, it is that of another tokenizer, and only EOS counts. A padding
    token past the model's ids is none of the model's.
    """
    eos, stops = tokenizer.eos_token_id, id_list(generation.eos_token_id)
    known = [token for token in stops if token in tokenizer.special_ids] if eos in stops else []
    pad = tokenizer.pad_token_id
    pad = None if pad is not None and pad >= config.vocab_size else pad
    for settings in (config, generation):
        settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, pad
        settings.eos_token_id = known if len(known) > 1 else eos


def id_list(ids: int | list[int] | None) -> list[int]:
    """The ids in a key of a config, which may hold one, several or none; as published ones have it, -1 is none."""
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return [index for index in listed if index >= 0]


def _config_at(path: FolderOrHub) -> PretrainedConfig:
    if isinstance(path, Path):
        with readable(path, where="model.path: "):
            _check_folder(path)
    file = f"{path}/{CONFIG}"
    where = f"model.path: {file}: "

    def check(values: Mapping[str, Any]) -> None:
        family_of(values["model_type"])
        check_values(values, where=where)
        if values.get("quantization_config") is not None:
            raise UserError(
                f"{where}quantization_config: the weights are quantized, and training needs BF16, F16 or F32 ones"
            )

    config = read_config(path, where="model.path: ", file=file, check=check)
    check_shapes(config, where=where)
    return config


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"model.path: the folder '{folder}' does not exist; fetch the model there, "
            "or give a hub name (owner/name)"
        )
    if not (folder / CONFIG).is_file() and not (folder / CONFIG).is_symlink():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"model.path: the folder '{folder}' holds adapters, and training begins with a whole model: merge them into "
                "their base (bico-ds export RUN FOLDER, or peft's merge_and_unload), and give that folder"
            )
        raise UserError(
            f"model.path: the folder '{folder}' has no config.json; give a folder with config.json and *.safetensors"
        )


def _config_from_recipe(values: dict[str, Any]) -> PretrainedConfig:
    values = dict(values)
    model_type = values.pop("model_type", "llama")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), FAMILIES)
        raise UserError(
            f"model.config.model_type: unknown model type '{model_type}'{hint}; supported: {', '.join(FAMILIES)}"
        )
    family_of(model_type)
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
        raise UserError(f"model.config: {one_line(error)}") from error
    check_shapes(config, where="model.config.")
    return config


def _require_same_architecture(found: PretrainedConfig, wanted: PretrainedConfig, path: str) -> None:
    theirs, ours = architecture_values(found), architecture_values(wanted)
    pairs = {key: (theirs[key], ours[key]) for key in _ARCHITECTURE_KEYS}
    differences = [
        f"{key}: {of_path!r} at the path, {of_recipe!r} in the recipe"
        for key, (of_path, of_recipe) in pairs.items()
        if of_path != of_recipe
    ]
    if differences:
        raise UserError(
            f"the model at '{path}' is not the one 'model.config' describes:\n  " + "\n  ".join(differences)
        )


def architecture_values(config: PretrainedConfig) -> dict[str, Any]:
    """What tells this config's network from others."""
    return {key: _architecture_value(config, key) for key in _ARCHITECTURE_KEYS}


def _architecture_value(config: PretrainedConfig, key: str) -> Any:
    """A value of a config; of a rotary embedding without `type`, the older name of `rope_type`, which transformers keeps."""
    value = getattr(config, key, None)
    if key == "rope_parameters" and isinstance(value, dict) and "rope_type" in value:
        return {name: part for name, part in value.items() if name != "type"}
    return value
