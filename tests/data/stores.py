"""Small real token stores for the tests of sequences, packing and loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
    tokens: NDArray[np.int64] | None = None,
    prompt_lengths: NDArray[np.int64] | None = None,
    entity_numbers: NDArray[np.int64] | None = None,
) -> TokenStore:
    """A store whose documents have these lengths.

    Where they are not given: token ids count up through the store, so each is unique; prompts are drawn; every token lies
    in an entity, where there are any.
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
    if tokens is None:
        tokens = 10 + np.arange(total) % 90_000
    if add_bos:
        tokens[(np.cumsum(sizes) - sizes)[sizes > 0]] = BOS
    if entity_numbers is None and has_entities:
        entity_numbers = 1 + np.arange(total) % 3
    with TokenStoreWriter(path, header) as writer:
        writer.append(
            tokens,
            sizes,
            prompt_lengths=rng.integers(0, sizes + 1) if prompt_lengths is None else prompt_lengths,
            groups=np.arange(len(sizes)),
            word_starts=rng.random(total) < 0.5,
            entity_numbers=entity_numbers,
        )
        writer.finish()
    return TokenStore.open(path)
