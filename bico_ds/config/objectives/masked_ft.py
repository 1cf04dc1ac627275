"""The recipe's keys of masked fine-tuning, and what it costs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from bico_ds.config.objectives.base import AttentionMode, MonitorPlace, ObjectiveCost, ObjectiveSpec
from bico_ds.config.objectives.masks import MaskSpec, PlaceholderId

_BYTES_PER_TOKEN = 4  # of English
_RATE = (0.0, 1.0)


class MaskedFtSpec(ObjectiveSpec):
    """Masked fine-tuning: a text is predicted behind a copy of it with masked tokens (2510.09885)."""

    kind: Literal["masked_ft"] = "masked_ft"
    mask: MaskSpec = MaskSpec(rate=_RATE)
    mask_id: PlaceholderId = None
    instruction: str = Field(
        "", description="text in front of the masked copy", examples=["Restore the text: "]
    )
    separator: str = Field("", description="text between the masked copy and the text", examples=["\n"])

    monitor: ClassVar[MonitorPlace] = MonitorPlace(colour="#7f8c8d")
    attention: ClassVar[AttentionMode] = "causal"
    as_written: ClassVar[bool] = False

    @field_validator("mask", mode="before")
    @classmethod
    def _a_mask_without_a_rate_has_this_default(cls, mask: Any) -> Any:
        """Not that of masks in general, when another key of it is given."""
        return {"rate": _RATE, **mask} if isinstance(mask, dict) else mask

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
