"""Our layers inside Hugging Face models: the classes of modules are changed, the weights stay.

With an `AttentionPlan` (and the `Layout` made of it) a layer runs `packed_attention` on the packed rows of a batch,
and fused elementwise work around it. Without one it is Hugging Face's own forward, bit by bit, so that generation
with a KV cache and every export stay plain causal models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from bico_ds.attention.layout import Layout
from bico_ds.attention.packed import packed_attention
from bico_ds.attention.plan import AttentionPlan
from bico_ds.common.errors import UserError
from bico_ds.model.config_values import FIXED_ROPE_TYPES, ROPE_REFUSALS
from bico_ds.model.elementwise import norm_kernels, swap_elementwise
from bico_ds.model.families import FAMILIES, family_of


class _PackedAttention:
    """Mixed in before a Hugging Face attention class; adds the keywords `plan` and `layout` to its forward."""

    packed_backend = "auto"
    has_qk_norms = False

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        plan: AttentionPlan | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> Any:
        """hidden_states [1, T, E] with a plan of T rows, [batch, length, E] without one; `layout`: of `packed_attention`.

        Returns the mixed states, of the same shape, and None where Hugging Face's attention returns its weights.
        """
        if plan is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return self._packed(hidden_states, kwargs["position_embeddings"], plan, layout), None

    def _packed(
        self: Any,
        hidden_1TE: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        layout: Layout | None,
    ) -> Tensor:
        rows = (hidden_1TE.shape[1], -1, self.head_dim)
        q_TNH, k_TNH, v_TNH = (
            projection(hidden_1TE).view(rows) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.has_qk_norms:
            q_TNH, k_TNH = self.q_norm(q_TNH, fused=True), self.k_norm(k_TNH, fused=True)
        cos_TH, sin_TH = (table[0] for table in position_embeddings)
        out_TNH = packed_attention(
            q_TNH,
            k_TNH,
            v_TNH,
            cos_TH,
            sin_TH,
            plan,
            scale=self.scaling,
            backend=self.packed_backend,
            layout=layout,
        )
        return self.o_proj(out_TNH.reshape(*hidden_1TE.shape[:2], -1))


class NormedOnce:
    """The normed rows that enter a layer, for its first run: where the layer is recomputed, it norms their sum again.

    A checkpointed layer so keeps that sum alone.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows: Tensor | None = rows

    def take(self, norm: nn.Module, total: Tensor) -> Tensor:
        """The rows, once; then those that `norm` makes of the sum that they were made of."""
        rows, self._rows = self._rows, None
        return _NormedAgain.apply(total, norm.weight, norm) if rows is None else rows


class _NormedAgain(torch.autograd.Function):
    """A norm that keeps nothing: gradients take the way of the first run, whose layer needs but the values again.

    The weight, which under ZeRO-3 is there in the module alone, says whether the rows need a gradient, as theirs did.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, weight: Tensor, norm: nn.Module) -> Tensor:
        return norm(total, fused=True)


def enter(layer: Any, branch: Tensor, total: Tensor | None) -> tuple[NormedOnce | None, Tensor]:
    """What a packed layer takes of the one before it, as its `normed` and hidden_states [1, T, E].

    `branch`: what is to be added to `total`; of the first layer the embeddings, to nothing. Hugging Face's norm, which
    keeps more than a sum, is left to the layer, and so is a norm that has nothing to add.
    """
    if total is None:
        return None, branch
    if norm_kernels(layer.input_layernorm, branch) is None:
        return None, total + branch
    normed_1TE, total = layer.input_layernorm(branch, residual=total, fused=True)
    return NormedOnce(normed_1TE), total


class _PackedLayer:
    """Mixed in before a Hugging Face decoder layer; adds the keywords `plan`, `layout` and `normed` to its forward."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        *args: Any,
        plan: AttentionPlan | None = None,
        layout: Layout | None = None,
        normed: NormedOnce | None = None,
        **kwargs: Any,
    ) -> Any:
        """Without a plan Hugging Face's own. With one, hidden_states and `normed` are what `enter` gives.

        Then it returns (branch, total), both [1, T, E]: their sum is the layer's output, which the next norm makes.
        """
        if plan is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        norm = self.input_layernorm
        mixed_1TE, _ = self.self_attn(
            norm(hidden_states, fused=True) if normed is None else normed.take(norm, hidden_states),
            *args,
            plan=plan,
            layout=layout,
            **kwargs,
        )
        normed_1TE, total_1TE = self.post_attention_layernorm(mixed_1TE, residual=hidden_states, fused=True)
        return self.mlp(normed_1TE, fused=True), total_1TE


def _packed_classes() -> dict[type, type]:
    """By a class of Hugging Face, ours."""
    classes: dict[type, type] = {}
    for family in FAMILIES.values():
        attention, layer = family.attention, family.layer
        norms = {"has_qk_norms": family.qk_norms}
        classes[attention] = type(f"Packed{attention.__name__}", (_PackedAttention, attention), norms)
        classes[layer] = type(f"Packed{layer.__name__}", (_PackedLayer, layer), {})
    return classes


_PACKED_CLASS = _packed_classes()


def swap_layers(
    model: PreTrainedModel, backend: str = "auto", *, longest_document: int | None = None
) -> None:
    """Change every decoder layer of a causal LM of one of the `FAMILIES` to ours, in place.

    `backend`: of `packed_attention`. `longest_document`: tokens of the longest document (or the bin capacity, which bounds
    it); needed by models with a sliding window. Raises `UserError` as `check_attention` does.
    """
    check_attention(model.config, longest_document=longest_document)
    for layer in model.model.layers:
        for module in (layer, layer.self_attn):
            module.__class__ = _PACKED_CLASS[type(module)]
        layer.self_attn.packed_backend = backend
    swap_elementwise(model)


def check_attention(config: PretrainedConfig, *, longest_document: int | None = None) -> None:
    """Raise `UserError` if our op cannot stand in for the attention of this architecture.

    It cannot for another model type, rotary type or head size, for dropout, and for a sliding window that a document
    exceeds. This needs the config alone, no model.
    """
    family = family_of(config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % 8:
        raise UserError(
            f"the model's attention heads have {head_dim} dimensions; kernels need a multiple of 8"
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"the model's config has partial_rotary_factor {parameters['partial_rotary_factor']}, but {config.model_type} "
            "models rotate all of a head: remove it from the config"
        )
    rope = parameters.get("rope_type", "default")
    if rope not in FIXED_ROPE_TYPES:
        reason = ROPE_REFUSALS.get(rope, "whose frequencies are not known here")
        raise UserError(
            f"the model's rotary embedding is of type '{rope}', {reason}. "
            f"Supported: {', '.join(FIXED_ROPE_TYPES)}"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise UserError(
            f"the model's config has attention_dropout {config.attention_dropout}, which packed attention "
            "does not do: set 'attention_dropout' to 0.0 in its config.json"
        )
    window = config.sliding_window if family.has_window else None
    if window is not None and (longest_document is None or longest_document > window):
        length = "of unknown length" if longest_document is None else f"of up to {longest_document} tokens"
        raise UserError(
            f"the model attends within a sliding window of {window} tokens, but documents are {length}: "
            f"set 'data.capacity' to {window} or less"
        )
