"""The packed batch, which the data loader hands to the model.

Shape legend: T rows in the batch, D documents, N rows that have a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from bico_ds.attention.layout import Layout
from bico_ds.attention.plan import AttentionPlan, map_tensors


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """The start model's distribution at M rows: its K likeliest tokens, and the token that is the row's target.

    `ids` int64 [M, K], `log_probs` fp32 [M, K], `target_log_probs` fp32 [M].
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    target_log_probs: torch.Tensor

    def rows(self, rows: slice) -> TeacherRows:
        """The same of some rows."""
        return TeacherRows(
            ids=self.ids[rows], log_probs=self.log_probs[rows], target_log_probs=self.target_log_probs[rows]
        )


@dataclass(frozen=True, kw_only=True)
class ComparedRows:
    """Which targets' rows are compared with the start model: `index` int64 [M] counts in the batch's loss rows.

    `teacher`: its stored distributions; None: it is computed, by switching the adapters off. `exclude_target`: the targets
    are left out of both distributions.
    """

    index: torch.Tensor
    exclude_target: bool = False
    teacher: TeacherRows | None = None


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch, ready for the model.

    Token order: kept tokens by document, then live ones by document. `loss_rows[n]` is the row whose output
    predicts `targets[n]`. `represented_tokens` counts the original tokens, dropped ones included.
    `documents` names the documents inside, (source, id, piece) each, for messages about a bad batch. `layout`: which
    kernel serves which rows, by the attention backend's policy; a worker of the loader makes it from the plan. None: the
    backend is the oracle, which needs none, or every layer builds its own. `target_sources`: the number of each target's
    data source; None: nobody asks. `loss_weights`: what each target's loss is multiplied by, positive; the loss of a step is
    then divided by the sum of all weights. None: all are 1. `compared`: what `retention` compares in a causal batch, perhaps
    no row of it; None: nothing is compared in this step, on no rank.
    """

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T]
    plan: AttentionPlan
    loss_rows: torch.Tensor  # int64 [N]
    targets: torch.Tensor  # int64 [N]
    represented_tokens: int
    documents: torch.Tensor  # int64 [D, 3]
    layout: Layout | None = None
    target_sources: torch.Tensor | None = None  # int64 [N]
    loss_weights: torch.Tensor | None = None  # fp32 [N]
    compared: ComparedRows | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """Move everything the model reads; `documents` stays where it is."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Pin the tensors that `to` moves, for an asynchronous copy to CUDA."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, transform: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        moved = [field.name for field in fields(self) if field.name != "documents"]
        return replace(self, **{name: map_tensors(getattr(self, name), transform) for name in moved})


def total_weight(batch: PackedBatch) -> float:
    """Return the sum of the weights of the targets' losses: their number where they have none."""
    weights = batch.loss_weights
    return float(len(batch.targets)) if weights is None else float(weights.double().sum())


def target_sources(batch: PackedBatch) -> torch.Tensor:
    """Return the number of each target's data source, int64 [N]."""
    plan = batch.plan
    kept = torch.repeat_interleave(torch.arange(plan.num_documents), plan.cu_seqlens.diff().long())
    document = torch.cat([kept, plan.live_document])
    return batch.documents[:, 0][document[batch.loss_rows]]
