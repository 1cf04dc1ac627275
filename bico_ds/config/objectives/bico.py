"""The recipe's keys of BICO's mask denoising, and what it costs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bico_ds.config.bounds import Bound
from bico_ds.config.objectives.base import MonitorPlace, ObjectiveCost, ObjectiveSpec
from bico_ds.config.objectives.masks import MaskSpec


class BicoSpec(ObjectiveSpec):
    """Autoregressive mask denoising under bidirectional attention (2311.07468, section 3)."""

    kind: Literal["bico"] = "bico"
    mask: MaskSpec = MaskSpec()
    placeholder_id: Annotated[int, Bound(least=0, why="it is a token's id")] | None = Field(
        None, description="input id of a masked position; null: the tokenizer's unk, pad or eos"
    )

    monitor: ClassVar[MonitorPlace] = MonitorPlace(colour="#ef8636")

    def cost(self, lengths: NDArray[np.int64]) -> ObjectiveCost:
        """An estimate from lengths alone: see `MaskSpec.expect`."""
        expected = self.mask.expect(lengths)
        return ObjectiveCost(
            kept_rows=lengths - expected.masked,
            live_rows=expected.live,
            pairs=expected.pairs,
            head_rows=expected.masked,
        )
