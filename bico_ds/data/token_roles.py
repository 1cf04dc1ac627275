"""What an objective must know of a run's tokens, by its tokenizer."""

from __future__ import annotations

from functools import partial

from bico_ds.data.tokenizer import Tokenizer, special_ids, text_ids
from bico_ds.objectives.base import TokenRoles


def token_roles(tokenizer: Tokenizer, *, vocabulary: int) -> TokenRoles:
    """The roles of its tokens for a model that embeds the ids below `vocabulary`.

    The placeholder is the unknown token, else the padding token, else EOS, whichever the model embeds.
    """
    candidates = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return TokenRoles(
        special_ids=tuple(sorted(special_ids(tokenizer))),
        placeholder_id=next(
            (token for token in candidates if token is not None and token < vocabulary), None
        ),
        vocabulary=vocabulary,
        encode=partial(text_ids, tokenizer),
    )
