"""Which values of a model's config make a model; the same for recipes and for config.json files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.bounds import Bound
from bico_ds.config.model_sizes import SIZES

# The numbers of a config that transformers takes as they come; it warns of some and builds the model all the same.
_BOUNDS = {
    **SIZES,
    "max_position_embeddings": Bound(least=1, most=2**31 - 1, why="it is the model's context in tokens"),
    "sliding_window": Bound(least=1, most=2**31 - 1, why="a token attends to itself at least"),
    "rms_norm_eps": Bound(above=0, most=0.1, why="norms divide by the root of a mean square plus this"),
    "initializer_range": Bound(least=0, most=1, why="it is the deviation of random weights"),
    "rope_theta": Bound(above=1, most=1e15, why="rotations become slower by powers of it"),
}
# Of `rope_scaling`, or `rope_parameters`.
_ROPE_BOUNDS = {
    "rope_theta": _BOUNDS["rope_theta"],
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
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose table at a position depends on that position alone: those that can be trained."""
# By the types of rotary embeddings that transformers knows, the keys without which one is not defined.
_ROPE_NEEDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
# Why we train no others than `FIXED_ROPE_TYPES`.
_MOVING = "whose frequencies depend on the longest position of a packed batch: documents would change with their neighbours"
ROPE_REFUSALS = {
    "dynamic": _MOVING,
    "longrope": _MOVING,
    "proportional": "which turns a part of each head, and the models that can be trained turn all of it",
}
"""Types that transformers knows, and that cannot be trained: the reason."""
# Where these are left out, transformers takes them from the config's top; null it takes for a number.
_ROPE_NEVER_NULL = ("rope_theta", "original_max_position_embeddings")
# transformers' own, which it takes in the place of one that is left out.
_ROPE_DEFAULTS = {"beta_fast": 32, "beta_slow": 1}
# Its theta beside a `rope_scaling`, with which it does not read the one of `rope_parameters`.
_DEFAULT_THETA = PretrainedConfig.default_theta


def check_values(values: Mapping[str, Any], *, where: str) -> None:
    """Raise `UserError` where the values of a config.json make no model; `where` comes before their keys.

    A key that is left out, or null, has the family's default. Values of another type transformers refuses, but for those
    of rotations.
    """
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) or k == "rope_theta"}
    problems = _out_of_bounds(numbers, _BOUNDS)
    for section in ("rope_scaling", "rope_parameters"):
        if isinstance(values.get(section), Mapping):
            problems += [f"{section}.{problem}" for problem in _wrong_rotation(values[section])]
        elif section in values and (problem := _no_rotation(values[section])) is not None:
            problems.append(f"{section}: {problem}")
    problems += _two_rotations(values)
    activation = values.get("hidden_act")
    if activation is not None and not (isinstance(activation, str) and activation in ACT2FN):
        problems.append(
            f"hidden_act: unknown activation '{activation!s:.60}'{did_you_mean(str(activation), ACT2FN)}"
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
    if layers := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        return [
            f"{layers[0]:.60}: rotations by the type of a layer are not known to these models; give one for all layers"
        ]
    if nulls := [key for key in _ROPE_NEVER_NULL if key in rope and rope[key] is None]:
        return [f"{nulls[0]}: must be a number, found null; leave it out"]
    if not isinstance(rope.get("truncate", True), bool):
        return [f"truncate: must be true or false, found {rope['truncate']!r:.60}"]
    if problems := _wrong_type(rope):
        return problems
    given = {**_ROPE_DEFAULTS, **{key: value for key, value in rope.items() if value is not None}}
    return [
        f"{low}: must be less than {high} ({given[high]}) (found {given[low]})"
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))
        if low in given and high in given and given[low] >= given[high]
    ]


def _no_rotation(value: Any) -> str | None:
    """What is wrong with a rotation that is no mapping, where transformers passes over it or fails on it."""
    # Of any other value it says which type it expects.
    if value is None or (value and not isinstance(value, str | list)):
        return None
    example = {"rope_type": "linear", "factor": 2.0}
    return f"must be a mapping with a rope_type, such as {example}, or null, found {value!r:.60}"


def _wrong_type(rope: Mapping[str, Any]) -> list[str]:
    """What is wrong with the type of a rotation, or with the keys that go with it."""
    key = "type" if "type" in rope and "rope_type" not in rope else "rope_type"
    kind = rope.get(key, "default")
    if key not in rope and "factor" in rope:
        return ["rope_type: is missing beside a factor, without which nothing is scaled"]
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        hint = did_you_mean(str(kind), _ROPE_NEEDS)
        return [
            f"{key}: unknown type of rotary embedding {kind!r:.60}{hint}; known: {', '.join(_ROPE_NEEDS)}, of which "
            f"{', '.join(FIXED_ROPE_TYPES)} can be trained"
        ]
    if kind == "default" and rope.get("factor", 1) not in (None, 1):
        return [
            f"{key}: is 'default' beside a factor of {rope['factor']}, which scales nothing; name the type that it is of"
        ]
    return [
        f"{needed}: is missing, and a rotary embedding of type '{kind}' is not defined without it"
        for needed in _ROPE_NEEDS[kind]
        if rope.get(needed) is None
    ]


def _two_rotations(values: Mapping[str, Any]) -> list[str]:
    """Where the names of transformers 4 and those of 5 stand side by side with different values: each reads its own."""
    new, scaling = values.get("rope_parameters"), values.get("rope_scaling")
    if not isinstance(new, Mapping):
        return []
    new, theta = _typed(new), values.get("rope_theta")
    old = {"rope_theta": ("rope_theta", theta)}
    if isinstance(scaling, Mapping) and scaling:
        old |= {f"rope_scaling.{key}": (key, value) for key, value in _typed(scaling).items()}
        if theta is None and scaling.get("rope_theta") is None:
            old["rope_theta, left out beside rope_scaling"] = ("rope_theta", _DEFAULT_THETA)
    return [
        f"{name}: must be as rope_parameters.{key} ({new[key]!r}), found {value!r}: other programs read the one or the other"
        for name, (key, value) in old.items()
        if value is not None and new.get(key) is not None and value != new[key]
    ]


def _typed(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A rotation whose type has one name; transformers takes `type` where `rope_type` is missing."""
    rest = {key: value for key, value in rope.items() if key not in ("type", "rope_type")}
    return {**rest, "rope_type": rope.get("rope_type", rope.get("type"))}
