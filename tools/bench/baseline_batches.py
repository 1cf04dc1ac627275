"""The same documents, masks and weights in the form in which others train on them: no packed rows and no kernel of ours.

* BICO as its authors compute it (arXiv 2311.07468, section 3): documents padded to the longest, the two score matrices of
  both rotations in full, the one or the other chosen by position, masked tokens as placeholders that no query sees.
  Their code also rounds scores to fp16 and bf16; that is left out here.
* Next-token prediction by Hugging Face's own forward: documents packed in one sequence, whose position ids begin anew
  with each; or one document per row of a batch, where all are equally long and nothing is padded.

Shape legend: B rows of a batch, L tokens of its longest, H heads, D dimensions of a head.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bico_ds.attention.plan import map_tensors
from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.documents import Documents
from bico_ds.model.build import TrainableModel
from bico_ds.model.head import Losses
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.masks import MaskPolicy, TokenGrid

IGNORED = -100  # Hugging Face's label of a token that is no target


@dataclass(frozen=True, kw_only=True)
class BaselineBatch:
    """Input ids, position ids and labels int64 [B, L], as Hugging Face's forward takes them.

    `is_key` bool [B, L]: which tokens may be seen, by dense bidirectional attention; None: causal attention. `targets`
    int64 [N]: the labels that count.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    is_key: Tensor | None
    targets: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> BaselineBatch:
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> BaselineBatch:
        return map_tensors(self, lambda tensor: tensor.pin_memory())

    def loss(self, causal_lm: PreTrainedModel) -> Tensor:
        """The sum of the losses of all targets, by Hugging Face's own loss."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "labels": self.labels,
            "use_cache": False,
        }
        if self.is_key is not None:
            inputs["is_key"] = self.is_key  # reaches `_DenseBico`
        return causal_lm(**inputs).loss * len(self.targets)


def causal_packed(documents: Documents) -> BaselineBatch:
    """All documents in one row."""
    grid = TokenGrid.of(documents)
    labels = np.where(grid.position == 0, IGNORED, documents.token_ids)
    return _batch(documents.token_ids[None], grid.position[None], labels[None])


def causal_rows(documents: Documents) -> BaselineBatch:
    """A document per row. All must be equally long: nothing masks padding."""
    assert len(set(documents.lengths.tolist())) == 1
    ids = documents.token_ids.reshape(len(documents), -1)
    labels = ids.copy()
    labels[:, 0] = IGNORED
    return _batch(ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), labels)


def bico_padded(
    documents: Documents, policy: MaskPolicy, key: BatchKey, *, placeholder_id: int
) -> BaselineBatch:
    """A document per row, padded to the longest, with the masks that `policy` draws."""
    grid = TokenGrid.of(documents)
    masked = policy.draw(documents, grid, key)
    shape = (len(documents), int(documents.lengths.max()))
    where = grid.document, grid.position

    def padded(values: NDArray, padding: int) -> NDArray:
        rows = np.full(shape, padding, values.dtype)
        rows[where] = values
        return rows

    batch = _batch(
        padded(np.where(masked, placeholder_id, documents.token_ids), placeholder_id),
        np.broadcast_to(np.arange(shape[1]), shape),
        padded(np.where(masked, documents.token_ids, IGNORED), IGNORED),
    )
    return replace(batch, is_key=torch.from_numpy(padded(~masked, False)))


def _batch(input_ids: NDArray, position_ids: NDArray, labels: NDArray) -> BaselineBatch:
    ids, positions, expected = (
        torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
        for values in (input_ids, position_ids, labels)
    )
    return BaselineBatch(
        input_ids=ids,
        position_ids=positions,
        labels=expected,
        is_key=None,
        targets=expected[expected != IGNORED],
    )


class _DenseBico:
    """Mixed in before the attention class of a Llama's layers; adds the keyword `is_key` to its forward."""

    def forward(
        self: Any, hidden_states: Tensor, *args: Any, is_key: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """hidden_states [B, L, E] with `is_key` bool [B, L]: the mixed states by the paper's formula, and no weights."""
        if is_key is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        q_BHLD, k_BHLD, v_BHLD = (
            projection(hidden_states).view(heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        k_BHLD, v_BHLD = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (k_BHLD, v_BHLD))
        cos, sin = kwargs["position_embeddings"]
        forward_q, forward_k = apply_rotary_pos_emb(q_BHLD, k_BHLD, cos, sin)
        reverse_q, reverse_k = apply_rotary_pos_emb(q_BHLD, k_BHLD, cos, -sin)
        position = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        is_earlier = position[None, :] <= position[:, None]
        scores_BHLL = torch.where(is_earlier, forward_q @ forward_k.mT, reverse_q @ reverse_k.mT)
        scores_BHLL = (scores_BHLL * self.scaling).masked_fill(~is_key[:, None, None, :], -torch.inf)
        weights_BHLL = torch.softmax(scores_BHLL, dim=-1, dtype=torch.float32).to(v_BHLD.dtype)
        out_BLE = (weights_BHLL @ v_BHLD).transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
        return self.o_proj(out_BLE), None


class ComparedModel(TrainableModel):
    """Our model, which also takes the baselines' batches: without a plan its layers are Hugging Face's, bit by bit."""

    @classmethod
    def around(cls, model: TrainableModel) -> ComparedModel:
        """Around a Llama's weights, where each layer is recomputed, or none. Raises `UserError` for another model."""
        if model.config.model_type != "llama" or model.recompute_every > 1:
            raise UserError(
                "the baselines are Llamas that recompute every layer or none: take another --recipe, or set "
                "model.activation_checkpointing to 0 or 1"
            )
        for layer in model.causal_lm.model.layers:
            its_class = type(layer.self_attn)
            layer.self_attn.__class__ = type(f"Dense{its_class.__name__}", (_DenseBico, its_class), {})
        if model.recompute_every:
            with warnings.catch_warnings():
                # By transformers 5.17's name of it, which newer ones warn of.
                warnings.simplefilter("ignore", FutureWarning)
                model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(model.causal_lm, recompute_every=model.recompute_every)

    def forward(self, batch: PackedBatch | BaselineBatch) -> Losses:
        """The sum of the losses of the batch's targets; Hugging Face recomputes its layers by itself."""
        for layer in self.causal_lm.model.layers:
            layer.gradient_checkpointing = bool(self.recompute_every) and isinstance(batch, BaselineBatch)
        if not isinstance(batch, BaselineBatch):
            return super().forward(batch)
        loss = batch.loss(self.causal_lm)
        return Losses(loss, loss.new_zeros(()), loss.new_zeros(0))
