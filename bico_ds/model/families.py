"""The model families that can be trained, and all that is known of each: one entry per family.

To add one, write its entry. The code relies on what all families here have in common; a family that differs (as Gemma does
in its norms and in the scale of its embeddings) needs a change in the code named:

* Each decoder layer adds attention and a gated MLP to its input, each behind a norm, and the last hidden states are normed
  once more (`swap._PackedLayer`, `build.TrainableModel`).
* The embeddings enter the first layer as they are, and `rotary_emb` gives one table for all layers, of a kind that the top
  level of `rope_parameters` names (`build.TrainableModel`, `swap.check_attention`).
* The attention has `q_proj`, `k_proj`, `v_proj`, `o_proj`, `head_dim` and `scaling`; its scores are not capped
  (`swap._PackedAttention`).
* A norm is RMSNorm, with the product `weight * x` and `variance_epsilon` (`elementwise.rms_norm`); it starts at weights
  of 1 (`weights/initialize.py`), and its name ends in `norm`.
* The output layer is linear, without a bias, and its logits are not capped (`head.swap_head`).
* A sliding window is the same for all layers (`swap.check_attention`).
* What makes two configs different networks is in `architecture._ARCHITECTURE_KEYS`, and no module but `rotary_emb` has
  buffers (`weights/materialize.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm

from bico_ds.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: the classes of transformers that its modules have, and how its attention differs from Llama's.

    `qkv_bias`: its q, k and v always have biases (Llama's have them where `attention_bias` is true). `qk_norms`: q and k
    are normed per head before the rotation, by `q_norm` and `k_norm`. `has_window`: it heeds `sliding_window` in its
    config (`swap.check_attention` refuses a window that a document exceeds).
    """

    attention: type[nn.Module]
    layer: type[nn.Module]
    norm: type[nn.Module]
    mlp: type[nn.Module]
    qkv_bias: bool = False
    qk_norms: bool = False
    has_window: bool = False


FAMILIES = {
    "llama": Family(attention=LlamaAttention, layer=LlamaDecoderLayer, norm=LlamaRMSNorm, mlp=LlamaMLP),
    "mistral": Family(
        attention=MistralAttention,
        layer=MistralDecoderLayer,
        norm=MistralRMSNorm,
        mlp=MistralMLP,
        has_window=True,
    ),
    "qwen2": Family(
        attention=Qwen2Attention,
        layer=Qwen2DecoderLayer,
        norm=Qwen2RMSNorm,
        mlp=Qwen2MLP,
        qkv_bias=True,
        has_window=True,
    ),
    "qwen3": Family(
        attention=Qwen3Attention,
        layer=Qwen3DecoderLayer,
        norm=Qwen3RMSNorm,
        mlp=Qwen3MLP,
        qk_norms=True,
        has_window=True,
    ),
}
"""By the `model_type` of a config."""


def family_of(model_type: str) -> Family:
    """Return the family of a config's `model_type`. Raises `UserError`, which lists the known ones, where it is another."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model type '{model_type}' is not supported: its attention is not known to be Llama's. "
            f"Supported: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
