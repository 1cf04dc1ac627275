"""Next-token prediction: causal attention, token i predicts token i + 1 of its document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bico_ds.attention.plan import build_plan
from bico_ds.batch import PackedBatch
from bico_ds.config.objectives.ntp import NtpSpec
from bico_ds.documents import Documents
from bico_ds.objectives.base import BatchKey, Store, TokenRoles, require_completions, require_replies
from bico_ds.objectives.masks import TokenGrid, replies_of


@dataclass(frozen=True, kw_only=True)
class NextTokenPrediction:
    """All tokens are kept; a document's last token predicts nothing.

    `loss_on: completion` counts only targets after the prompt (`Documents.prompt_length`), `replies` those in replies
    (`Documents.is_reply`).
    """

    spec: NtpSpec
    name: str = "ntp"
    key: str = "objectives[0]"

    @classmethod
    def of(cls, spec: NtpSpec, tokens: TokenRoles, *, name: str, key: str) -> NextTokenPrediction:
        """`tokens` are not needed."""
        return cls(spec=spec, name=name, key=key)

    def identity(self) -> dict[str, Any]:
        """The spec's."""
        return self.spec.identity()

    def check(self, store: Store) -> None:
        """Raises `UserError` where only completions, or replies, count, and the store has none."""
        if self.spec.loss_on == "completion":
            require_completions(f"{self.key}.loss_on", store)
        if self.reads_replies:
            require_replies(f"{self.key}.loss_on", store)

    @property
    def reads_replies(self) -> bool:
        """Whether the targets depend on where a store says that replies are."""
        return self.spec.loss_on == "replies"

    def expand(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents themselves."""
        return lengths

    @property
    def predicts(self) -> str:
        """By `loss_on`."""
        where = {"all": "after the first", "completion": "after the prompt", "replies": "of a reply"}
        return f"a token {where[self.spec.loss_on]}"

    def possible_targets(self, documents: Documents) -> NDArray[np.bool_]:
        """The targets themselves: nothing is drawn."""
        return self._is_target(documents, TokenGrid.of(documents))

    def _is_target(self, documents: Documents, grid: TokenGrid) -> NDArray[np.bool_]:
        first = np.ones(len(documents), dtype=np.int64)
        if self.spec.loss_on == "completion":
            first = np.maximum(documents.prompt_length, 1)
        is_target = grid.position >= first[grid.document]
        return is_target & replies_of(documents) if self.reads_replies else is_target

    def build(self, documents: Documents, key: BatchKey) -> PackedBatch:
        """Build the causal micro-batch; `key` is not needed."""
        grid = TokenGrid.of(documents)
        return causal_batch(
            documents,
            token_ids=documents.token_ids,
            lengths=documents.lengths,
            is_target=self._is_target(documents, grid),
        )


def causal_batch(
    documents: Documents,
    *,
    token_ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    is_target: NDArray[np.bool_],
) -> PackedBatch:
    """Build the batch of causal rows that were made of `documents`, in their order.

    `token_ids` int64 [T], `lengths` int64 [D]: each document's rows, at positions from 0. `is_target` bool [T]: where the
    row before has a loss; never True at position 0.
    """
    target = np.flatnonzero(is_target)
    first_row = np.cumsum(lengths) - lengths
    return PackedBatch(
        input_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(np.arange(len(token_ids)) - np.repeat(first_row, lengths)),
        plan=build_plan("causal", kept_lengths=lengths),
        loss_rows=torch.from_numpy(target - 1),
        targets=torch.from_numpy(token_ids[target]),
        represented_tokens=len(documents.token_ids),
        documents=names(documents),
    )


def names(documents: Documents) -> torch.Tensor:
    """Return int64 [D, 3]: source, id and piece of each document."""
    return torch.from_numpy(np.stack([documents.source, documents.id, documents.piece], axis=1))
