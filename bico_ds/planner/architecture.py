"""The shapes of a model, from its config.json or the recipe: what parameters there are, without torch or transformers.

Only shapes are read here, and only what they depend on is checked; whether the config makes a model that can be trained is
checked by `bico_ds.model.architecture`, which needs transformers. `tests/planner/test_architecture.py` compares both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.config.model_sizes import SIZES
from bico_ds.config.sections.model import LoraSpec, ModelSpec

# What transformers takes where a config leaves a key out, by model type.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"vocab_size": 32_000, "intermediate_size": 11_008, "head_dim": None},
    "mistral": {
        "vocab_size": 32_000,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "head_dim": None,
    },
    "qwen2": {
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "head_dim": None,
    },
    "qwen3": {"vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32, "head_dim": 128},
}
_COMMON_DEFAULTS = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer of the decoder: its weight is [outputs, inputs], its bias (if it has one) [outputs]."""

    name: str
    outputs: int
    inputs: int
    bias: bool = False

    @property
    def weight_elements(self) -> int:
        return self.outputs * self.inputs

    @property
    def parameters(self) -> int:
        return self.weight_elements + (self.outputs if self.bias else 0)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A causal LM of one of the families of `bico_ds.model.families`: sizes of its tensors, in elements.

    All `layers` decoder layers are alike: `linears`, two norms of `hidden` elements, and with `qk_norms` two of `head_dim`.
    `tied_head`: the head's weight is the embedding's.
    """

    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    tied_head: bool
    qk_norms: bool
    linears: tuple[Linear, ...]
    source: str
    """Where the shapes were read: a file, or the recipe's key."""

    @property
    def norm_elements(self) -> int:
        """Of one decoder layer."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norms else 0)

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer, norms and biases among them."""
        return sum(linear.parameters for linear in self.linears) + self.norm_elements

    @cached_property
    def layer_matrix_elements(self) -> int:
        """Of one decoder layer's linear weights."""
        return sum(linear.weight_elements for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding; a head that is not tied has as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, a tied head counted once."""
        heads = 1 if self.tied_head else 2
        return heads * self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    def adapted(self, lora: LoraSpec) -> tuple[Linear, ...]:
        """The linear layers of a decoder layer that get adapters."""
        return tuple(linear for linear in self.linears if linear.name in lora.targets)

    def adapter_parameters(self, lora: LoraSpec) -> int:
        """Elements of all adapters: A [rank, inputs] and B [outputs, rank] per adapted layer."""
        per_layer = sum(lora.rank * (linear.inputs + linear.outputs) for linear in self.adapted(lora))
        return self.layers * per_layer

    def trained_parameters(self, lora: LoraSpec | None) -> int:
        """What the optimizer updates: the adapters, or without them everything."""
        return self.parameters if lora is None else self.adapter_parameters(lora)

    def trained_sizes(self, lora: LoraSpec | None) -> tuple[int, ...]:
        """Elements of each tensor that the optimizer updates, in the order of the model's parameters."""
        if lora is not None:
            layer = [
                lora.rank * size for linear in self.adapted(lora) for size in (linear.inputs, linear.outputs)
            ]
            return tuple(layer) * self.layers
        attention, mlp = self.linears[:4], self.linears[4:]
        layer = [*_weights_and_biases(attention), *[self.head_dim] * (2 * self.qk_norms)]
        layer += [*_weights_and_biases(mlp), self.hidden, self.hidden]
        head = () if self.tied_head else (self.embedding_parameters,)
        return (self.embedding_parameters, *layer * self.layers, self.hidden, *head)


def read_architecture(spec: ModelSpec) -> Architecture:
    """The architecture that a recipe's `model` names: of the folder's config.json where it is here, else of `model.config`.

    Raises `UserError` where neither is here, and for a config that names no known family, or no shapes.
    """
    path = spec.path.here() if spec.path is not None else None
    if isinstance(path, Path) and (path / "config.json").is_file():
        return architecture_of(_read_json(path / "config.json"), source=f"{path}/config.json")
    if spec.config is not None:
        return architecture_of(spec.config, source="model.config")
    raise UserError(
        f"model.path: '{spec.path}' is no folder with a config.json on this machine, and the recipe has no model.config to "
        "plan from; fetch the model there, or give model.config"
    )


def check_adapters(architecture: Architecture, lora: LoraSpec) -> None:
    """Raise `UserError` for adapters that no run makes, as `bico_ds.model.lora.check_lora` does with the model itself."""
    linears = {linear.name: linear for linear in architecture.linears}
    for target in lora.targets:
        if target not in linears:
            raise UserError(
                f"model.lora.targets: no linear layer '{target}' in the decoder{did_you_mean(target, linears)}; "
                f"there are {', '.join(sorted(linears))}"
            )
        outputs, inputs = linears[target].outputs, linears[target].inputs
        if lora.rank > min(outputs, inputs):
            raise UserError(
                f"model.lora.rank: {lora.rank} is above the rank of {target}, which is {outputs} x {inputs}: the adapters "
                f"would be larger than what they change; give at most {min(outputs, inputs)}"
            )


def architecture_of(values: Mapping[str, Any], *, source: str) -> Architecture:
    """The architecture of a config's values, by the names of config.json; `source` comes before the keys in errors."""
    model_type = values.get("model_type", "llama")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise UserError(
            f"{source}: model_type: '{model_type!s:.60}' is not supported{did_you_mean(str(model_type), _DEFAULTS)}; "
            f"supported: {', '.join(_DEFAULTS)}"
        )
    given = {key: value for key, value in values.items() if value is not None}
    known = {**_COMMON_DEFAULTS, **_DEFAULTS[model_type], **given}
    hidden, heads = _size(known, "hidden_size", source), _size(known, "num_attention_heads", source)
    key_heads = _size({"num_key_value_heads": heads, **known}, "num_key_value_heads", source)
    head_dim = hidden // heads if known["head_dim"] is None else _size(known, "head_dim", source)
    intermediate = _size(known, "intermediate_size", source)
    if known["head_dim"] is None and hidden % heads:
        raise UserError(
            f"{source}: hidden_size: must be a multiple of num_attention_heads ({heads}) where there is no head_dim, "
            f"found {hidden}"
        )
    if heads % key_heads:
        raise UserError(
            f"{source}: num_key_value_heads: must divide num_attention_heads ({heads}), found {key_heads}"
        )
    return Architecture(
        model_type=model_type,
        vocabulary=_size(known, "vocab_size", source),
        hidden=hidden,
        intermediate=intermediate,
        layers=_size(known, "num_hidden_layers", source),
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        tied_head=bool(known.get("tie_word_embeddings", False)),
        qk_norms=model_type == "qwen3",
        linears=_linears(model_type, known, hidden, intermediate, heads * head_dim, key_heads * head_dim),
        source=source,
    )


def _linears(
    model_type: str, values: Mapping[str, Any], hidden: int, intermediate: int, query: int, key: int
) -> tuple[Linear, ...]:
    """In the order of a decoder layer; `query` and `key` are all heads' dimensions together."""
    has_keys = model_type in ("llama", "qwen3")
    attention = has_keys and bool(values.get("attention_bias", False))
    qkv = attention or model_type == "qwen2"
    mlp = model_type == "llama" and bool(values.get("mlp_bias", False))
    return (
        Linear(name="q_proj", outputs=query, inputs=hidden, bias=qkv),
        Linear(name="k_proj", outputs=key, inputs=hidden, bias=qkv),
        Linear(name="v_proj", outputs=key, inputs=hidden, bias=qkv),
        Linear(name="o_proj", outputs=hidden, inputs=query, bias=attention),
        Linear(name="gate_proj", outputs=intermediate, inputs=hidden, bias=mlp),
        Linear(name="up_proj", outputs=intermediate, inputs=hidden, bias=mlp),
        Linear(name="down_proj", outputs=hidden, inputs=intermediate, bias=mlp),
    )


def _weights_and_biases(linears: Sequence[Linear]) -> list[int]:
    """Elements of each tensor of these layers."""
    return [size for linear in linears for size in (linear.weight_elements, *[linear.outputs] * linear.bias)]


def _size(values: Mapping[str, Any], key: str, source: str) -> int:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{source}: {key}: must be a whole number of at least 1, found {value!r:.60}")
    if (problem := SIZES[key].problem(value)) is not None:
        raise UserError(f"{source}: {key}: {problem}")
    return value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, strict=False)
    except JsonError as error:
        raise UserError(f"{file}: cannot be read: {error.reason}; copy it again") from None
