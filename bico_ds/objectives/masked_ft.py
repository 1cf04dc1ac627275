"""Masked fine-tuning (arXiv 2510.09885): a causal model restores a text from a copy of it with masked tokens.

Documents as they are train only the direction that they are written in. Behind its masked copy, each token of a text is
predicted from tokens on both sides of it, with an ordinary causal model and mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bico_ds.batch import PackedBatch
from bico_ds.common.errors import UserError
from bico_ds.config.objectives.masked_ft import MaskedFtSpec
from bico_ds.documents import Documents
from bico_ds.objectives.base import TokenRoles
from bico_ds.objectives.masked import MaskedObjective, placeholder_of
from bico_ds.objectives.masks import TokenGrid
from bico_ds.objectives.ntp import causal_batch


@dataclass(frozen=True, kw_only=True)
class MaskedFineTuning(MaskedObjective):
    """A document of L tokens becomes instruction, masked copy, separator and the L tokens, at positions 0 … n - 1.

    Both copies are complete, with BOS and EOS, which are never masked. `mask_id` stands for each masked token. Every token
    of the second copy is a target, its first one too.
    """

    spec: MaskedFtSpec
    mask_id: int
    instruction: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    name: str = "masked_ft"

    @classmethod
    def of(cls, spec: MaskedFtSpec, tokens: TokenRoles, *, name: str, key: str) -> MaskedFineTuning:
        """Where the spec names no `mask_id`, the tokenizer's unk, pad or eos is taken.

        Raises `UserError` where there is none, and for texts that the vocabulary lacks.
        """
        return cls(
            spec=spec,
            special_ids=tokens.special_ids,
            mask_id=placeholder_of(spec.mask_id, tokens, f"{key}.mask_id"),
            instruction=_ids(spec.instruction, tokens, f"{key}.instruction"),
            separator=_ids(spec.separator, tokens, f"{key}.separator"),
            name=name,
            key=key,
        )

    def identity(self) -> dict[str, Any]:
        """The spec's, with the tokens that are never masked, the one at masked positions, and those of the two texts."""
        texts = {"instruction_ids": list(self.instruction), "separator_ids": list(self.separator)}
        return super().identity() | {"mask_id": self.mask_id} | texts

    def expand(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Both copies, with instruction and separator."""
        return 2 * lengths + len(self.instruction) + len(self.separator)

    @property
    def predicts(self) -> str:
        """All of them."""
        return "every token"

    def possible_targets(self, documents: Documents) -> NDArray[np.bool_]:
        """All of them, masked or not."""
        return np.ones(len(documents.token_ids), dtype=bool)

    def of_mask(self, documents: Documents, grid: TokenGrid, masked: NDArray[np.bool_]) -> PackedBatch:
        """The causal micro-batch."""
        lengths, rows = documents.lengths, self.expand(documents.lengths)
        first_row = np.cumsum(rows) - rows
        copy = (first_row + len(self.instruction))[grid.document] + grid.position
        text = copy + (lengths + len(self.separator))[grid.document]
        token_ids = np.empty(int(rows.sum()), dtype=np.int64)
        token_ids[copy] = np.where(masked, self.mask_id, documents.token_ids)
        token_ids[text] = documents.token_ids
        token_ids[first_row[:, None] + np.arange(len(self.instruction))] = self.instruction
        behind = first_row + len(self.instruction) + lengths
        token_ids[behind[:, None] + np.arange(len(self.separator))] = self.separator
        is_target = np.zeros(len(token_ids), dtype=bool)
        is_target[text] = True
        return causal_batch(documents, token_ids=token_ids, lengths=rows, is_target=is_target)


def _ids(text: str, tokens: TokenRoles, key: str) -> tuple[int, ...]:
    """The ids of a recipe's text.

    Raises `UserError` for words without one, a text without any, and where the model embeds no such id.
    """
    if not text:
        return ()
    assert tokens.encode is not None, "whoever makes objectives of a recipe with texts has its tokenizer"
    try:
        ids = tokens.encode(text)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if not ids:
        raise UserError(f"{key}: the tokenizer makes no token of {text!r}: leave it out, or write other text")
    if max(ids) >= tokens.vocabulary:
        raise UserError(
            f"{key}: the tokenizer gives id {max(ids)}, and the model's vocabulary has {tokens.vocabulary}; write it "
            "in other words"
        )
    return ids
