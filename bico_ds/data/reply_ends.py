"""By which tokens the replies of a store end, and whether generation stops there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from bico_ds.data.store import TokenStore
from bico_ds.data.tokenizer import FastTokenizer, special_ids

_MOST_DOCUMENTS = 1000  # one template wrote all of them


def reply_ends(store: TokenStore) -> Counter[int]:
    """How many replies end in each token id, in the first documents of a store that tells replies."""
    documents = store.whole(np.arange(min(len(store), _MOST_DOCUMENTS)))
    if documents.is_reply is None or not len(documents):
        return Counter()
    goes_on = np.append(documents.is_reply[1:], False)
    goes_on[documents.offsets[1:] - 1] = False
    return Counter(documents.token_ids[documents.is_reply & ~goes_on].tolist())


def unstopped_replies(
    source: str, store: TokenStore, tokenizer: FastTokenizer, stops: Sequence[int]
) -> str | None:
    """A warning where most replies end in a special token, and generation from the export does not stop at it.

    `stops`: the ids at which it does. Replies that end in an ordinary token are the loader's to warn of.
    """
    ends = reply_ends(store)
    if not ends:
        return None
    (token, count), replies = ends.most_common(1)[0], ends.total()
    if token in stops or token not in special_ids(tokenizer) or 2 * count <= replies:
        return None
    end, *known = tokenizer.convert_ids_to_tokens([token, *stops])
    return (
        f"source '{source}': {count:,} of {replies:,} replies end in {end} (id {token}), and generation from the export "
        f"stops at {' or '.join(known)}, so that it goes on after a reply: take a tokenizer whose eos_token is {end} "
        "(model.tokenizer, and prepare the data with it), or a chat template that ends turns with the other"
    )
