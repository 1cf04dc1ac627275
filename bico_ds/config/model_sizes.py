"""The sizes that a model's config may have, for models that are built and for those that are planned."""

from __future__ import annotations

from bico_ds.config.bounds import Bound

SIZES = {
    "vocab_size": Bound(least=1, most=2**31 - 1, why="it is the number of token ids"),
    "hidden_size": Bound(least=1, most=2**20, why="it is the width of the hidden states"),
    "intermediate_size": Bound(least=1, most=2**24, why="it is the width of the MLPs"),
    "num_hidden_layers": Bound(least=1, most=10_000, why="a model without layers learns nothing"),
    "num_attention_heads": Bound(least=1, most=2**16, why="attention without heads mixes nothing"),
    "num_key_value_heads": Bound(least=1, most=2**16, why="each serves the same number of query heads"),
    "head_dim": Bound(least=2, most=2**16, why="rotations turn its dimensions in pairs"),
}
