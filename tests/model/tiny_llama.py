"""The tiny models of these tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "rope_theta": 10000.0,
}


def save_llama(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """Write a random Hugging Face Llama in several shards, and return it."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE, tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model
