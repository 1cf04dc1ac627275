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
class PackedBatch:
    """One micro-batch, ready for the model.

    Token order: kept tokens by document, then live placeholders by document. `loss_rows[n]` is the row whose output
    predicts `targets[n]`. `represented_tokens` counts the original tokens, dropped placeholders included.
    `documents` names the documents inside, (source, id, piece) each, for messages about a bad batch. `layout`: which
    kernel serves which rows, by the attention backend's policy; a worker of the loader makes it from the plan. None: the
    backend is the oracle, which needs none, or every layer builds its own.
    """

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T]
    plan: AttentionPlan
    loss_rows: torch.Tensor  # int64 [N]
    targets: torch.Tensor  # int64 [N]
    represented_tokens: int
    documents: torch.Tensor  # int64 [D, 3]
    layout: Layout | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """Move everything the model reads; `documents` stays where it is."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Pin the tensors that `to` moves, for an asynchronous copy to CUDA."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, transform: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        moved = [field.name for field in fields(self) if field.name != "documents"]
        return replace(self, **{name: map_tensors(getattr(self, name), transform) for name in moved})
