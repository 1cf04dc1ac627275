"""The index tables by which the Triton kernels find their rows and keys. Built once per batch, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bico_ds.attention.tiles import TileRows


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """`rows`: query rows per block of the forward and query-gradient kernels; `keys`: keys per block of the third."""

    rows: int
    keys: int


@dataclass(frozen=True, kw_only=True)
class RowBlocks:
    """Q query rows of the batch, kept and live, cut into B blocks, and their documents' keys, cut into C blocks.

    `rows`, `split` int32 [Q]: where each row lies in the batch, and how many keys of its document take the forward
    rotation; by document, within one by split. Every range below but `keys` counts entries of this table.

    `query_blocks` int32 [B, 4]: begin and end; then where the document's keys begin in the batch, and how many there are.
    `key_blocks` int32 [C, 7]: the block's first key within its document; where the document's keys begin, and how many
    there are; then the document's begin, `some_forward`, `all_forward` and end. From `some_forward` on a row takes some
    of the block's keys with the forward rotation, from `all_forward` on all of them; the others it takes reversed.

    Blocks with the most work come first, so that the last ones to run are short. `num_kept`: kept rows of the batch.
    """

    rows: Tensor
    split: Tensor
    query_blocks: Tensor
    key_blocks: Tensor
    num_kept: int
    sizes: BlockSizes

    @staticmethod
    def of(rows: TileRows, sizes: BlockSizes) -> RowBlocks:
        present = rows.counts > 0
        documents = _Documents(
            counts=rows.counts[present],
            starts=(np.cumsum(rows.counts) - rows.counts)[present],
            key_starts=rows.key_starts[present],
            key_counts=rows.key_counts[present],
        )
        tables = (
            rows.rows,
            rows.split,
            _query_blocks(documents, rows.split, sizes.rows),
            _key_blocks(documents, rows.split, sizes.keys),
        )
        tensors = [torch.from_numpy(table.astype(np.int32)) for table in tables]
        return RowBlocks(
            rows=tensors[0],
            split=tensors[1],
            query_blocks=tensors[2],
            key_blocks=tensors[3],
            num_kept=int(rows.key_counts.sum()),
            sizes=sizes,
        )

    def arguments(self) -> tuple[Tensor | int, ...]:
        """As the ops take them."""
        tables = (self.rows, self.split, self.query_blocks, self.key_blocks)
        return *tables, self.num_kept, self.sizes.rows, self.sizes.keys


@dataclass(frozen=True, kw_only=True)
class _Documents:
    """Of every document with query rows, [D]: its entries of the table, and its keys in the batch."""

    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    key_starts: NDArray[np.int64]
    key_counts: NDArray[np.int64]


def _query_blocks(documents: _Documents, split: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    owner, begin = _cut(documents.counts, size)
    end = np.minimum(begin + size, documents.counts[owner])
    begin, end = documents.starts[owner] + begin, documents.starts[owner] + end
    keys = documents.key_counts[owner]
    blocks = np.stack([begin, end, documents.key_starts[owner], keys], axis=1)
    return blocks[np.lexsort((split[end - 1], keys))[::-1]]


def _key_blocks(documents: _Documents, split: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    owner, first = _cut(documents.key_counts, size)
    keys, begin = documents.key_counts[owner], documents.starts[owner]
    last = np.minimum(first + size, keys) - 1
    # One ascending sequence over all documents, in which a key finds the first row whose split lies behind it.
    step = documents.key_counts.max() + 1
    places = np.repeat(np.arange(documents.counts.size), documents.counts) * step + split
    some_forward, all_forward = (
        np.searchsorted(places, owner * step + key, side="right") for key in (first, last)
    )
    end = begin + documents.counts[owner]
    columns = (first, documents.key_starts[owner], keys, begin, some_forward, all_forward, end)
    return np.stack(columns, axis=1)[np.lexsort((end - some_forward, end - begin))[::-1]]


def _cut(counts: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Blocks of at most `size`: the range of each, and where it begins within it."""
    blocks = -(-counts // size)
    owner = np.repeat(np.arange(counts.size), blocks)
    number = np.arange(owner.size) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    return owner, number * size
