"""What objectives that predict masked tokens have in common: which rows a batch has, and which of them predict what.

Kept tokens see all kept tokens of their document, those behind them by the reversed rotation. A masked token is in the batch
only where the objective gives it a row: a *live* one, after all kept rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.config.objectives.masks import MaskSpec
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey, Store, TokenRoles, require_completions, require_replies
from bico_ds.objectives.masks import MaskPolicy, TokenGrid
from bico_ds.objectives.ntp import names


class MaskedSpec(Protocol):
    """What is needed of the recipe's entry."""

    @property
    def mask(self) -> MaskSpec: ...

    def identity(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class MaskedObjective(ABC):
    """Draws which tokens are masked; a subclass makes the batch of it, and of nothing else that is drawn.

    `special_ids` are never masked.
    """

    spec: MaskedSpec
    special_ids: tuple[int, ...] = ()
    name: str
    key: str = "objectives[0]"

    @property
    def policy(self) -> MaskPolicy:
        """Which tokens are masked."""
        return MaskPolicy(spec=self.spec.mask, special_ids=self.special_ids)

    def identity(self) -> dict[str, Any]:
        """The spec's, with the tokens that are never masked."""
        return self.spec.identity() | {"special_ids": list(self.special_ids)}

    def check(self, store: Store) -> None:
        """Raises `UserError` where the store does not mark what is to be masked."""
        if self.spec.mask.eligible == "completion":
            require_completions(f"{self.key}.{self.mask_key('eligible')}", store)
        if self.reads_replies:
            require_replies(f"{self.key}.{self.mask_key('eligible')}", store)
        if self.spec.mask.unit == "entity" and not store.has_entities:
            raise UserError(
                f"{self.key}.{self.mask_key('unit')} is 'entity', but the token store has no entity spans: prepare the "
                "data again with entities_field or entities_pattern, or choose unit: token or word"
            )

    @property
    def reads_replies(self) -> bool:
        """Whether the masks depend on where a store says that replies are."""
        return self.spec.mask.eligible == "replies"

    def mask_key(self, name: str) -> str:
        """The recipe's key, within its entry, of this part of the mask."""
        return f"mask.{name}"

    def expand(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents themselves: capacity counts original tokens."""
        return lengths

    @property
    def predicts(self) -> str:
        """By the mask."""
        mask = self.spec.mask
        unit = "a token of an entity" if mask.unit == "entity" else "a token"
        where = {"all": "after the first", "completion": "after the prompt", "replies": "of a reply"}
        return f"{unit} {where[mask.eligible]} that is not special"

    def possible_targets(self, documents: Documents) -> NDArray[np.bool_]:
        """All tokens that may be masked: each masked token is predicted."""
        return self.policy.eligible(documents, TokenGrid.of(documents))

    def build(self, documents: Documents, key: BatchKey) -> PackedBatch:
        """Draw the masks of (`key`, document) and build the micro-batch."""
        grid = TokenGrid.of(documents)
        return self.of_mask(documents, grid, self.policy.draw(documents, grid, key))

    @abstractmethod
    def of_mask(self, documents: Documents, grid: TokenGrid, masked: NDArray[np.bool_]) -> PackedBatch:
        """The micro-batch where these tokens are masked, bool [T]."""


def placeholder_of(given: int | None, tokens: TokenRoles, key: str) -> int:
    """Return the input id of a masked position: the recipe's, `given`, or else the tokenizer's.

    Raises `UserError` where there is none, or the vocabulary does not have it; `key` is the recipe's key of `given`.
    """
    placeholder = given if given is not None else tokens.placeholder_id
    if placeholder is None:
        raise UserError(
            f"{key} is not given, and the tokenizer has no unk, pad or eos "
            "token: name a token id that stands at masked positions"
        )
    if placeholder >= tokens.vocabulary:
        raise UserError(
            f"{key}: {placeholder} is past the vocabulary; name an id from 0 to "
            f"{tokens.vocabulary - 1}, or null for the tokenizer's unk, pad or eos"
        )
    return placeholder


def before_masked(masked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return bool [T]: the masked tokens whose successor is masked too."""
    live = masked.copy()
    live[:-1] &= masked[1:]  # a document's first token is never masked, so no look crosses documents
    live[-1] = False
    return live


def build_masked(
    documents: Documents,
    grid: TokenGrid,
    masked: NDArray[np.bool_],
    live: NDArray[np.bool_],
    *,
    live_ids: NDArray[np.int64] | int,
    predict: Literal["same", "next"],
    live_spans: NDArray[np.int64] | None = None,
) -> PackedBatch:
    """Build the batch in which every masked token, bool [T], is predicted, and some of them are `live` rows, bool [T].

    `live_ids`: the live rows' input ids, int64 [live rows], or one for all. `predict`: a masked token is predicted at its
    own row, which must be live, or at the row of the token before, which must be kept or live. `live_spans`: of
    `build_plan`. Position ids keep their gaps.
    """
    kept = ~masked
    kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])  # [T + 1]
    kept_before_document = kept_before[documents.offsets]  # [D + 1]
    kept_at, live_at, masked_at = np.flatnonzero(kept), np.flatnonzero(live), np.flatnonzero(masked)
    row_of_token = kept_before[:-1].copy()  # of kept tokens; live ones follow, others have none
    row_of_token[live_at] = np.arange(len(live_at)) + len(kept_at)
    live_document = grid.document[live_at]
    live_split = kept_before[live_at + 1] - kept_before_document[live_document]
    return PackedBatch(
        input_ids=torch.from_numpy(
            np.concatenate([documents.token_ids[kept_at], np.broadcast_to(live_ids, live_at.shape)])
        ),
        position_ids=torch.from_numpy(np.concatenate([grid.position[kept_at], grid.position[live_at]])),
        plan=build_plan(
            "bidirectional",
            kept_lengths=np.diff(kept_before_document),
            live_document=live_document,
            live_split=live_split,
            live_spans=live_spans,
        ),
        loss_rows=torch.from_numpy(row_of_token[masked_at if predict == "same" else masked_at - 1]),
        targets=torch.from_numpy(documents.token_ids[masked_at]),
        represented_tokens=len(documents.token_ids),
        documents=names(documents),
    )
