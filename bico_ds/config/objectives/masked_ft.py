"""The recipe's keys of masked fine-tuning, and what it costs."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bico_ds.config.objectives.base import AttentionMode, MonitorPlace, ObjectiveCost, ObjectiveSpec
from bico_ds.config.objectives.masks import MaskSpec, PlaceholderId

_BYTES_PER_TOKEN = 4  # of English


class MaskedFtSpec(ObjectiveSpec):
    """Masked fine-tuning: a text is predicted behind a copy of it with masked tokens (2510.09885)."""

    kind: Literal["masked_ft"] = "masked_ft"
    mask: MaskSpec = MaskSpec(rate=(0.0, 1.0))
    mask_id: PlaceholderId = None
    instruction: str = Field("", description="text in front of the masked copy")
    separator: str = Field("", description="text between the masked copy and the text")

    monitor: ClassVar[MonitorPlace] = MonitorPlace(colour="#7f8c8d")
    attention: ClassVar[AttentionMode] = "causal"

    def cost(self, lengths: NDArray[np.int64]) -> ObjectiveCost:
        """Exact, but for instruction and separator: without a tokenizer, four bytes of them count as a token."""
        added = [-(-len(text.encode()) // _BYTES_PER_TOKEN) for text in (self.instruction, self.separator)]
        rows = (2 * lengths + sum(added)).astype(np.float64)
        return ObjectiveCost(
            kept_rows=rows,
            live_rows=np.zeros_like(rows),
            pairs=rows * (rows + 1) / 2,
            head_rows=lengths.astype(np.float64),
        )
