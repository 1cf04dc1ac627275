"""A tiny Llama and random documents for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bico_ds.config.sections.model import ModelSpec
from bico_ds.documents import Document, Documents
from bico_ds.model.build import TrainableModel, build_model
from bico_ds.objectives.base import BatchKey

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 4 heads of 16 dimensions are wider than the hidden size
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def small_model(**spec: Any) -> TrainableModel:
    options = ModelSpec.model_validate({"config": CONFIG, "dtype": "fp32", **spec})
    return build_model(options, seed=1, ds_config=None, device="cpu")


def random_documents(*lengths: int) -> tuple[Documents, BatchKey]:
    """Documents of these lengths, and a key for their masks; fresh ones in every call."""
    random = np.random.default_rng()
    texts = [
        Document(token_ids=random.integers(1, CONFIG["vocab_size"], n), source=0, id=i)
        for i, n in enumerate(lengths)
    ]
    return Documents.of(texts), BatchKey(seed=int(random.integers(2**31)), epoch=0)
