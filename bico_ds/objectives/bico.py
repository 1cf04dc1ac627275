"""BICO's autoregressive mask denoising (Lv et al., arXiv 2311.07468, section 3).

Some tokens are masked: no query attends to them. Attention is bidirectional, and the output at position i
predicts the original token at i + 1, with a loss only where that token is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.config.objectives.bico import BicoSpec
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey, Store, TokenRoles, require_completions
from bico_ds.objectives.masks import MaskPolicy, TokenGrid
from bico_ds.objectives.ntp import names


@dataclass(frozen=True, kw_only=True)
class MaskDenoising:
    """Masked tokens become rows only where they predict something.

    A masked token whose successor is masked too is *live*: a query-only row at the end of the batch, with
    `placeholder_id` as its input. Other masked tokens are *dead*: nothing reads their output, so they are
    dropped. All tokens that are not masked are *kept*. Position ids keep their gaps.
    """

    spec: BicoSpec
    placeholder_id: int
    special_ids: tuple[int, ...] = ()
    name: str = "bico"
    key: str = "objectives[0]"

    @classmethod
    def of(cls, spec: BicoSpec, tokens: TokenRoles, *, name: str, key: str) -> MaskDenoising:
        """Where the spec names no placeholder, the tokenizer's is taken. Raises `UserError` where there is none."""
        placeholder = spec.placeholder_id if spec.placeholder_id is not None else tokens.placeholder_id
        if placeholder is None:
            raise UserError(
                f"{key}.placeholder_id is not given, and the tokenizer has no unk, pad or eos "
                "token: name a token id that stands at masked positions"
            )
        if placeholder >= tokens.vocabulary:
            raise UserError(
                f"{key}.placeholder_id: {placeholder} is past the vocabulary; name an id from 0 to "
                f"{tokens.vocabulary - 1}, or null for the tokenizer's unk, pad or eos"
            )
        return cls(spec=spec, placeholder_id=placeholder, special_ids=tokens.special_ids, name=name, key=key)

    @property
    def policy(self) -> MaskPolicy:
        """Which tokens are masked."""
        return MaskPolicy(spec=self.spec.mask, special_ids=self.special_ids)

    def identity(self) -> dict[str, Any]:
        """The spec's, with the tokens that are never masked and the one at masked positions."""
        tokens = {"placeholder_id": self.placeholder_id, "special_ids": list(self.special_ids)}
        return self.spec.identity() | tokens

    def check(self, store: Store) -> None:
        """Raises `UserError` where the store does not mark what is to be masked."""
        if self.spec.mask.eligible == "completion":
            require_completions(f"{self.key}.mask.eligible", store)
        if self.spec.mask.unit == "entity" and not store.has_entities:
            raise UserError(
                f"{self.key}.mask.unit is 'entity', but the token store has no entity spans: prepare the data again "
                "with an entities field, or choose unit: token, span or word"
            )

    def expand(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents themselves: capacity counts original tokens."""
        return lengths

    @property
    def predicts(self) -> str:
        """By `mask`."""
        mask = self.spec.mask
        unit = "a token of an entity" if mask.unit == "entity" else "a token"
        return (
            f"{unit} after the {'prompt' if mask.eligible == 'completion' else 'first'} that is not special"
        )

    def possible_targets(self, documents: Documents) -> NDArray[np.bool_]:
        """All tokens that may be masked: the token before each has a row, whether it is masked or not."""
        return self.policy.eligible(documents, TokenGrid.of(documents))

    def build(self, documents: Documents, key: BatchKey) -> PackedBatch:
        """Draw the masks of (`key`, document) and build the bidirectional micro-batch."""
        grid = TokenGrid.of(documents)
        masked = self.policy.draw(documents, grid, key)
        kept = ~masked
        live = masked.copy()
        live[:-1] &= masked[1:]  # a document's first token is never masked, so no look crosses documents
        live[-1] = False

        kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])  # [T + 1]
        kept_before_document = kept_before[documents.offsets]  # [D + 1]
        kept_at, live_at, masked_at = np.flatnonzero(kept), np.flatnonzero(live), np.flatnonzero(masked)
        row_of_token = kept_before[:-1].copy()  # of kept tokens; live ones follow, dead ones have none
        row_of_token[live_at] = np.arange(len(live_at)) + len(kept_at)
        live_document = grid.document[live_at]
        live_split = kept_before[live_at + 1] - kept_before_document[live_document]
        return PackedBatch(
            input_ids=torch.from_numpy(
                np.concatenate([documents.token_ids[kept_at], np.full(len(live_at), self.placeholder_id)])
            ),
            position_ids=torch.from_numpy(np.concatenate([grid.position[kept_at], grid.position[live_at]])),
            plan=build_plan(
                "bidirectional",
                kept_lengths=np.diff(kept_before_document),
                live_document=live_document,
                live_split=live_split,
            ),
            loss_rows=torch.from_numpy(row_of_token[masked_at - 1]),
            targets=torch.from_numpy(documents.token_ids[masked_at]),
            represented_tokens=len(documents.token_ids),
            documents=names(documents),
        )
