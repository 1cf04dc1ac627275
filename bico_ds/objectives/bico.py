"""BICO's autoregressive mask denoising (Lv et al., arXiv 2311.07468, section 3).

Some tokens are masked: no query attends to them. Attention is bidirectional, and the output at position i
predicts the original token at i + 1, with a loss only where that token is masked. Under `predict: same`, BERT's way, the
output at a masked position predicts that position's own token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from bico_ds.batch import PackedBatch
from bico_ds.documents import Documents
from bico_ds.objectives.base import TokenRoles
from bico_ds.objectives.masked import (
    MaskedObjective,
    MaskedSpec,
    before_masked,
    build_masked,
    placeholder_of,
)
from bico_ds.objectives.masks import TokenGrid


class PlaceholderSpec(MaskedSpec, Protocol):
    """What is needed of the recipe's entry where placeholders stand at masked positions."""

    @property
    def placeholder_id(self) -> int | None: ...

    @property
    def predict(self) -> Literal["next", "same"]: ...


@dataclass(frozen=True, kw_only=True)
class MaskDenoising(MaskedObjective):
    """Masked tokens become rows only where they predict something.

    A masked token that predicts is *live*: a query-only row at the end of the batch, with `placeholder_id` as its input.
    Under `predict: next` these are the masked tokens whose successor is masked too, under `same` all of them. Other masked
    tokens are *dead*: nothing reads their output, so they are dropped. All tokens that are not masked are *kept*.
    Position ids keep their gaps.
    """

    spec: PlaceholderSpec
    placeholder_id: int
    name: str = "bico"

    @classmethod
    def of(cls, spec: PlaceholderSpec, tokens: TokenRoles, *, name: str, key: str) -> Self:
        """Where the spec names no placeholder, the tokenizer's is taken. Raises `UserError` where there is none."""
        placeholder = placeholder_of(spec.placeholder_id, tokens, f"{key}.placeholder_id")
        return cls(spec=spec, placeholder_id=placeholder, special_ids=tokens.special_ids, name=name, key=key)

    def identity(self) -> dict[str, Any]:
        """The spec's, with the tokens that are never masked and the one at masked positions."""
        return super().identity() | {"placeholder_id": self.placeholder_id}

    def of_mask(self, documents: Documents, grid: TokenGrid, masked: NDArray[np.bool_]) -> PackedBatch:
        """The batch of placeholders."""
        predict = self.spec.predict
        live = masked if predict == "same" else before_masked(masked)
        return build_masked(documents, grid, masked, live, live_ids=self.placeholder_id, predict=predict)
