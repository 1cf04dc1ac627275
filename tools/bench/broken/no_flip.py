"""BICO without its reversed rotation: keys behind a query take the forward one, too (`imports:` of a recipe).

To see what the rotation is for. Of the backends it breaks those that read a row's split, in which a batch of the fused CPU
kernel, of tiles or of the Triton kernels is; a flash kernel's second pass is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bico_ds.attention import layout
from bico_ds.attention.layout import FlashRows, _RowTable
from bico_ds.attention.plan import AttentionPlan


class _NoKeyBehind(_RowTable):
    """No key is behind a query; in causal mode the split is also the mask."""

    def __init__(self, plan: AttentionPlan, kept: NDArray[np.int64]) -> None:
        super().__init__(plan, kept)
        if plan.mode == "bidirectional":
            self.split = self.kept[self.document]


def _without_second_pass(plan: AttentionPlan, **rows: Any) -> FlashRows:
    if plan.mode == "bidirectional":
        raise RuntimeError(
            "no_flip.py does not break flash kernels: use a backend that has none for these documents"
        )
    return FlashRows(plan=plan, **rows)


layout._RowTable = _NoKeyBehind  # type: ignore[misc]
layout.FlashRows = _without_second_pass  # type: ignore[assignment, misc]
