"""What an objective is: it makes a packed batch of documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.documents import Documents


@dataclass(frozen=True, kw_only=True)
class BatchKey:
    """What randomness may depend on besides a document's name: never on its position, neighbours, rank or history.

    `epoch` is the pass over the document's source: one number, or one per document (int64 [D]), since a batch
    at the end of an epoch holds documents of the next one too. `seed` is the run's; a second objective of a kind has one of
    its own, so that it does not draw what the first one draws (`bico_ds.data.loading.sample_order`).
    """

    seed: int
    epoch: int | NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TokenRoles:
    """What an objective must know of the tokens it works on.

    `special_ids` (BOS, EOS, padding, …) are never text. `placeholder_id` is the input of a position whose token must not be
    seen; None where the tokenizer has none. `vocabulary`: ids that the model embeds, 0 … `vocabulary` - 1. `encode`: gives
    the ids of a text of the recipe, without BOS and EOS, and raises `UserError` for text that the tokenizer does not know;
    None: there is no tokenizer, and no objective has such text.
    """

    special_ids: tuple[int, ...]
    placeholder_id: int | None
    vocabulary: int
    encode: Callable[[str], tuple[int, ...]] | None = None


class Store(Protocol):
    """What an objective may ask a token store about its documents."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [n]."""
        ...

    @property
    def prompt_lengths(self) -> NDArray[np.int32]:
        """Tokens of each document's prompt, int32 [n]; 0 where it has none."""
        ...

    @property
    def completions(self) -> int:
        """How many documents have a prompt and more tokens after it."""
        ...

    @property
    def has_entities(self) -> bool:
        """Whether documents come with the spans of their entities."""
        ...

    @property
    def has_replies(self) -> bool:
        """Whether documents come with the tokens of their replies."""
        ...


class Objective(Protocol):
    """Decides what is visible and what is predicted."""

    @property
    def name(self) -> str:
        """Short and unique within a run: a tag in logs."""
        ...

    @classmethod
    def of(cls, spec: Any, tokens: TokenRoles, *, name: str, key: str) -> Self:
        """Make the objective of a recipe's entry; `key` is its key there, `objectives[0]`, for messages.

        Raises `UserError` where spec and tokens do not fit.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Return all that the batches depend on besides documents and key, JSON-able.

        That is the spec's identity, and those fields of the `TokenRoles` that the batches depend on. A resume with another
        identity is refused, unless `data.allow_change` is set.
        """
        ...

    def check(self, store: Store) -> None:
        """Raise `UserError` where this objective cannot train on the documents of this store."""
        ...

    def expand(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many tokens of a bin documents of these lengths take, both int64 [D].

        Pure: it is called before packing, with lengths of 1 … capacity.
        """
        ...

    def build(self, documents: Documents, key: BatchKey) -> PackedBatch:
        """Build the micro-batch of these documents, which must pass `check_batch`.

        Raises `ValueError` naming a document that cannot be trained on.
        """
        ...


@runtime_checkable
class TargetRule(Protocol):
    """What an `Objective` may have besides: which tokens it may ever predict, so that a run on none is refused."""

    @property
    def predicts(self) -> str:
        """What it predicts, for messages: `a token after the first`."""
        ...

    def possible_targets(self, documents: Documents) -> NDArray[np.bool_]:
        """Return bool [T]: True where some `BatchKey` makes the token a target of `build`.

        It is also asked about parts of documents: what is True there must be True in the complete document.
        """
        ...


def check_batch(batch: PackedBatch, documents: Documents, *, room: int, vocabulary: int) -> None:
    """Raise `UserError` where a model could not read the batch built of `documents`, or its tokens could not be counted.

    `room`: rows that the objective's `expand` promised at most; `vocabulary`: ids that the model embeds.
    """
    if not isinstance(batch, PackedBatch):
        raise UserError(f"its build() returned no PackedBatch, but {type(batch).__name__}")
    rows, tokens = batch.plan.num_rows, len(documents.token_ids)
    if rows > room:
        raise UserError(f"it built {rows} rows, where its expand() promised at most {room}")
    if not 1 <= batch.represented_tokens <= tokens:
        raise UserError(
            f"its represented_tokens is {batch.represented_tokens}: it counts the documents' own tokens, here up to {tokens}"
        )
    _check_column("documents", batch.documents, (batch.plan.num_documents, 3))
    _check_column("input_ids", batch.input_ids, (rows,), below=vocabulary, what="the vocabulary")
    _check_column("position_ids", batch.position_ids, (rows,))
    _check_column("targets", batch.targets, (len(batch.targets),), below=vocabulary, what="the vocabulary")
    _check_column("loss_rows", batch.loss_rows, (len(batch.targets),), below=rows, what="the rows")
    if batch.loss_weights is not None:
        _check_weights(batch.loss_weights, (len(batch.targets),))


def _check_column(
    name: str, column: torch.Tensor, shape: tuple[int, ...], *, below: int | None = None, what: str = ""
) -> None:
    _check_tensor(name, column, shape, torch.int64)
    low, high = (int(end) for end in column.aminmax()) if column.numel() else (0, 0)
    if low < 0:
        raise UserError(f"its {name} has {low}, and must not be negative")
    if below is not None and high >= below:
        raise UserError(f"its {name} has {high}, past {what}: at most {below - 1}")


def _check_weights(weights: torch.Tensor, shape: tuple[int, ...]) -> None:
    _check_tensor("loss_weights", weights, shape, torch.float32)
    wrong = ~(weights.isfinite() & (weights > 0))
    if wrong.any():
        raise UserError(
            f"its loss_weights has {weights[wrong][0]:g}: weights must be positive and finite; a token that counts "
            "nothing is no target"
        )


def _check_tensor(name: str, column: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(column, torch.Tensor) or column.dtype != dtype or tuple(column.shape) != shape:
        found = f"{getattr(column, 'dtype', type(column).__name__)} of shape {tuple(getattr(column, 'shape', ()))}"
        raise UserError(f"its {name} must be a tensor, {dtype} of shape {shape}, and is {found}")


def require_completions(spec_key: str, store: Store) -> None:
    """Raise `UserError` for a store without a completion, where an objective trains on completions alone.

    `spec_key` is the recipe's key whose value is `completion`.
    """
    if not store.completions:
        raise UserError(
            f"{spec_key} is 'completion', but none of the {len(store)} documents has a prompt with a completion: "
            f"prepare it with prompt_field and completion_field (or messages_field), or set {spec_key}: all"
        )


def require_replies(spec_key: str, store: Store) -> None:
    """Raise `UserError` for a store that does not tell replies, where an objective trains on replies alone.

    `spec_key` is the recipe's key whose value is `replies`.
    """
    if not store.has_replies:
        raise UserError(
            f"{spec_key} is 'replies', but the token store does not tell where replies are: prepare it (again) with "
            f"messages_field (or prompt_field and completion_field), or set {spec_key}: completion, for last replies alone"
        )
