"""The rotary embeddings that are served, with all keys that change them; `ORIGINAL` tokens are their first context."""

from __future__ import annotations

from typing import Any

from bico_ds.model.families import FAMILIES

ORIGINAL = 32
_FIRST = {"original_max_position_embeddings": ORIGINAL}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_FIRST}
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500000.0},
    "default as parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    "linear": {"rope_theta": 3e5, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "linear by its old name": {"rope_theta": 3e5, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": _LLAMA3},
    "llama3 by two names": {"rope_theta": 500000.0, "rope_scaling": {**_LLAMA3, "type": "linear"}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **_FIRST}},
    "yarn of the context": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn with everything": {
        "rope_theta": 1e6,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "attention_factor": 1.3,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
            **_FIRST,
        },
    },
    "yarn with two scales": {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, **_FIRST},
    },
}
CASES = [(model_type, rope) for model_type in FAMILIES for rope in ROPE]


def architecture(model_type: str, rope: str) -> dict[str, Any]:
    """The config of a tiny model, with weights so large that positions matter."""
    return {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 501,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        **ROPE[rope],
    }
