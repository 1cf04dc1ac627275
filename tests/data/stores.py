"""Small real token stores for the tests of sequences, packing and loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bico_ds.data.prepare.store_writer import TokenStoreWriter
from bico_ds.data.store import StoreHeader, TokenStore

BOS, EOS = 1, 2


def write_store(
    path: Path,
    lengths: list[int],
    *,
    add_bos: bool = False,
    has_entities: bool = False,
    seed: int = 0,
) -> TokenStore:
    """A store whose documents have these lengths.

    Token ids count up through the store, so each is unique. Every token lies in an entity, where there are any.
    """
    header = StoreHeader(
        vocab_size=100_000,
        tokenizer_hash="test",
        special_ids=(BOS, EOS),
        bos_id=BOS,
        eos_id=EOS,
        add_bos=add_bos,
        add_eos=False,
        has_entities=has_entities,
    )
    rng = np.random.default_rng(seed)
    sizes = np.array(lengths, dtype=np.int64)
    total = int(sizes.sum())
    tokens = 10 + np.arange(total) % 90_000
    if add_bos:
        tokens[(np.cumsum(sizes) - sizes)[sizes > 0]] = BOS
    with TokenStoreWriter(path, header) as writer:
        writer.append(
            tokens,
            sizes,
            prompt_lengths=rng.integers(0, sizes + 1),
            groups=np.arange(len(sizes)),
            word_starts=rng.random(total) < 0.5,
            entity_numbers=1 + np.arange(total) % 3 if has_entities else None,
        )
        writer.finish()
    return TokenStore.open(path)
