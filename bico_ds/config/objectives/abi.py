"""The recipe's keys of autoregressive blank infilling, and what it costs."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bico_ds.config.objectives.base import MonitorPlace, ObjectiveCost, ObjectiveSpec
from bico_ds.config.objectives.masks import MaskSpec


class AbiSpec(ObjectiveSpec):
    """Autoregressive blank infilling (GLM, 2103.10360), without new tokens."""

    kind: Literal["abi"] = "abi"
    mask: MaskSpec = MaskSpec()
    spans: Literal["separate", "left_to_right"] = Field(
        "separate",
        description="what a masked token sees of masked ones: those before it in its own span, or in the whole document",
    )

    monitor: ClassVar[MonitorPlace] = MonitorPlace(colour="#519d3e")

    def cost(self, lengths: NDArray[np.int64]) -> ObjectiveCost:
        """An estimate from lengths alone: see `MaskSpec.expect`."""
        expected = self.mask.expect(lengths)
        separate = self.spans == "separate"
        # Where all masked tokens are rows, each sees all kept tokens, and itself and those before it.
        over_kept = expected.pairs if separate else lengths * (lengths - expected.masked)
        joined = (expected.masked_squared + expected.masked) / 2
        span_pairs = expected.span_pairs if separate else joined
        return ObjectiveCost(
            kept_rows=lengths - expected.masked,
            live_rows=expected.live if separate else expected.masked,
            pairs=over_kept + span_pairs,
            head_rows=expected.masked,
            span_pairs=span_pairs,
        )
