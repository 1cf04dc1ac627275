"""Autoregressive blank infilling (GLM; Du et al., arXiv 2103.10360, section 2.1), without tokens of its own.

A span is a maximal run [p, q) of masked tokens. Part A is the kept tokens, which see each other and never a masked one.
Part B is rows of the masked tokens with their true ids: row t sees all of A and the rows of its own span up to itself.
The row at p - 1, which is kept, predicts the token at p, and row t the one at t + 1. All rows have the positions of the
text, where GLM has the position of the span and a second one within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.abi import AbiSpec
from bico_ds.documents import Documents
from bico_ds.objectives.base import TokenRoles
from bico_ds.objectives.masked import MaskedObjective, before_masked, build_masked
from bico_ds.objectives.masks import TokenGrid


@dataclass(frozen=True, kw_only=True)
class BlankInfilling(MaskedObjective):
    """Part B is the batch's live rows.

    By `spans: separate` a span has the rows t = p … q - 2: the last token's row predicts nothing, and nothing sees it. By
    `left_to_right` it has all of p … q - 1, since every row also sees those of the spans before its own.
    """

    spec: AbiSpec
    name: str = "abi"

    @classmethod
    def of(cls, spec: AbiSpec, tokens: TokenRoles, *, name: str, key: str) -> Self:
        """No placeholder is needed."""
        return cls(spec=spec, special_ids=tokens.special_ids, name=name, key=key)

    def of_mask(self, documents: Documents, grid: TokenGrid, masked: NDArray[np.bool_]) -> PackedBatch:
        """The batch of true ids."""
        if self.spec.spans == "left_to_right":
            live = masked
            rows = np.bincount(grid.document[live])
            live_spans = rows[rows > 0]
        else:
            live = before_masked(masked)
            live_spans = _run_lengths(live)
        return build_masked(
            documents,
            grid,
            masked,
            live,
            live_ids=documents.token_ids[live],
            predict="next",
            live_spans=live_spans,
        )


def _run_lengths(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The lengths of the maximal runs of True, in their order."""
    edges = np.diff(flags.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
