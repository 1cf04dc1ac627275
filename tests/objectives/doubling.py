"""A user's own objective, written as docs/extend.md describes it.

Every document is repeated once, with next-token prediction on the second copy alone. A recipe finds it by
`imports: [doubling.py]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.base import MonitorPlace, ObjectiveCost, ObjectiveSpec
from bico_ds.config.objectives.table import register
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey, Store, TokenRoles
from bico_ds.objectives.ntp import names


class DoublingSpec(ObjectiveSpec):
    kind: Literal["doubling"] = "doubling"
    shift: int = 0  # added to every target, to be seen in the identity

    monitor: ClassVar[MonitorPlace] = MonitorPlace(chart="loss on copies", colour="#44aa66")

    def cost(self, lengths):
        rows = 2.0 * lengths
        return ObjectiveCost(
            kept_rows=rows, live_rows=0 * rows, pairs=rows * (rows + 1) / 2, head_rows=1.0 * lengths
        )


@dataclass(frozen=True, kw_only=True)
class Doubling:
    spec: DoublingSpec
    name: str

    @classmethod
    def of(cls, spec: DoublingSpec, tokens: TokenRoles, *, name: str, key: str) -> Doubling:
        return cls(spec=spec, name=name)

    def identity(self) -> dict[str, Any]:
        return self.spec.identity()

    def check(self, store: Store) -> None: ...

    def expand(self, lengths):
        return 2 * lengths

    def build(self, documents: Documents, key: BatchKey) -> PackedBatch:
        lengths = documents.lengths
        pieces = np.split(documents.token_ids, documents.offsets[1:-1])
        tokens = np.concatenate([np.tile(piece, 2) for piece in pieces])
        starts = 2 * documents.offsets[:-1]
        position = np.arange(len(tokens)) - np.repeat(starts, 2 * lengths)
        target = np.flatnonzero(position >= np.repeat(lengths, 2 * lengths))
        return PackedBatch(
            input_ids=torch.from_numpy(tokens),
            position_ids=torch.from_numpy(position),
            plan=build_plan("causal", kept_lengths=2 * lengths),
            loss_rows=torch.from_numpy(target - 1),
            targets=torch.from_numpy(tokens[target] + self.spec.shift),
            represented_tokens=len(documents.token_ids),
            documents=names(documents),
        )


register(DoublingSpec, f"{__name__}:Doubling")
