"""BICO whose placeholders are keys: kind `placeholder_key` (`imports:` of a recipe), to see what hiding them is for.

A masked token stays in its row as the placeholder, like a [MASK] of BERT's; every query attends to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.base import MonitorPlace, ObjectiveCost
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.config.objectives.table import register
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.masks import TokenGrid
from bico_ds.objectives.ntp import names


class PlaceholderKeySpec(BicoSpec):
    """Keys as BICO's."""

    kind: Literal["placeholder_key"] = "placeholder_key"  # type: ignore[assignment]

    monitor: ClassVar[MonitorPlace] = MonitorPlace(colour="#555555")

    def cost(self, lengths: NDArray[np.int64]) -> ObjectiveCost:
        tokens = lengths.astype(np.float64)
        masked = self.mask.expect(lengths).masked
        return ObjectiveCost(kept_rows=tokens, live_rows=0 * tokens, pairs=tokens**2, head_rows=masked)


@dataclass(frozen=True, kw_only=True)
class PlaceholderKeys(MaskDenoising):
    """`MaskDenoising` on all rows of the documents."""

    def build(self, documents: Documents, key: BatchKey) -> PackedBatch:
        grid = TokenGrid.of(documents)
        masked = self.policy.draw(documents, grid, key)
        masked_at = np.flatnonzero(masked)
        return PackedBatch(
            input_ids=torch.from_numpy(np.where(masked, self.placeholder_id, documents.token_ids)),
            position_ids=torch.from_numpy(grid.position),
            plan=build_plan("bidirectional", kept_lengths=documents.lengths),
            loss_rows=torch.from_numpy(masked_at - 1),
            targets=torch.from_numpy(documents.token_ids[masked_at]),
            represented_tokens=len(documents.token_ids),
            documents=names(documents),
        )


register(PlaceholderKeySpec, f"{__name__}:PlaceholderKeys")
