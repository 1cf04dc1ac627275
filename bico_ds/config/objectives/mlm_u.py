"""The recipe's keys of masked language modelling at a uniform rate, and what it costs."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bico_ds.config.objectives.base import MonitorPlace, ObjectiveCost, ObjectiveSpec
from bico_ds.config.objectives.masks import Eligible, MaskSpec, PlaceholderId, Predict


class MlmUSpec(ObjectiveSpec):
    """MLM-U: a mask rate of U(0, 1) per document, whose loss is the mean over its masked tokens (2406.05183)."""

    kind: Literal["mlm_u"] = "mlm_u"
    predict: Predict = "same"
    unit: Literal["token", "word", "entity"] = Field(
        "token", description="what is masked as a whole: a token, a word, or an entity of the data"
    )
    eligible: Eligible = "all"
    placeholder_id: PlaceholderId = None

    monitor: ClassVar[MonitorPlace] = MonitorPlace(colour="#8d69b8")

    @property
    def mask(self) -> MaskSpec:
        """Which tokens are masked."""
        return MaskSpec(rate=(0.0, 1.0), unit=self.unit, eligible=self.eligible)

    def cost(self, lengths: NDArray[np.int64]) -> ObjectiveCost:
        """An estimate from lengths alone: see `MaskSpec.expect`."""
        return self.mask.expect(lengths).denoising_cost(lengths, self.predict)
