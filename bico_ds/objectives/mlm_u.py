"""Masked language modelling at a uniform rate, MLM-U (Kitouni et al., arXiv 2406.05183).

A document's mask rate is drawn from U(0, 1), so that every context, from nearly nothing to nearly all, is one that
its tokens are predicted from. A document's loss is the mean over its masked tokens, whatever their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.mlm_u import MlmUSpec
from bico_ds.documents import Documents
from bico_ds.objectives.bico import MaskDenoising
from bico_ds.objectives.masks import TokenGrid


@dataclass(frozen=True, kw_only=True)
class UniformRateDenoising(MaskDenoising):
    """`MaskDenoising` in which documents count alike; one without a masked token counts nothing."""

    spec: MlmUSpec
    name: str = "mlm_u"

    def mask_key(self, name: str) -> str:
        """The entry has the mask's keys itself."""
        return name

    def of_mask(self, documents: Documents, grid: TokenGrid, masked: NDArray[np.bool_]) -> PackedBatch:
        """The batch of placeholders, with 1 / (masked tokens of its document) as the weight of each target."""
        document = grid.document[masked]
        weights = 1.0 / np.bincount(document)[document]
        batch = super().of_mask(documents, grid, masked)
        return replace(batch, loss_weights=torch.from_numpy(weights.astype(np.float32)))
