"""The recipe's keys of BICO's mask denoising, and what it costs."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bico_ds.config.objectives.base import MonitorPlace, ObjectiveCost, ObjectiveSpec
from bico_ds.config.objectives.masks import MaskSpec, PlaceholderId, Predict


class BicoSpec(ObjectiveSpec):
    """Autoregressive mask denoising under bidirectional attention (2311.07468, section 3)."""

    kind: Literal["bico"] = "bico"
    mask: MaskSpec = MaskSpec()
    placeholder_id: PlaceholderId = None
    predict: Predict = "next"

    monitor: ClassVar[MonitorPlace] = MonitorPlace(colour="#ef8636")

    def cost(self, lengths: NDArray[np.int64]) -> ObjectiveCost:
        """An estimate from lengths alone: see `MaskSpec.expect`."""
        return self.mask.expect(lengths).denoising_cost(lengths, self.predict)
