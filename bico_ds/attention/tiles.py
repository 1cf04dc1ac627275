"""Dense tiles: which documents share one padded block of scores, and its masks. Built once per batch.

A tile holds B documents of like size as a block `[B, R, K]`: R query rows (kept and live, padded) against
K kept keys (padded). A document too large for one tile gets several, each a chunk of its query rows against
all its keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Scores per head of all tiles that keep their masks: three masks, so 24 MiB at most in bf16 and 48 in fp32.
_KEPT_SCORES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TileMasks:
    """A tile's masks, all [B, 1, R, K] in the dtype of its scores.

    `factors`: 1 where a score of this rotation counts, else 0; of the forward and, in bidirectional mode, the
    reversed rotation. `bias`: 0 where a query sees a key, else -inf.
    """

    factors: tuple[Tensor, ...]
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One padded block of B documents, R query rows and K keys each.

    `query_rows` int64 [B·R], `key_rows` int64 [B·K]: where each row is read in the batch; padding
    repeats the document's first one here. `query_slots` [B·R], `key_slots` [B·K]: where results are written;
    padding goes to a trash row behind the batch (index T). `split` [B, R]: how many keys of the document
    take the forward rotation; `key_count` [B]: keys that exist. `keeps_masks`: `with_masks` builds its `masks` for all
    layers; else each use builds them, so that those of long documents with many live rows take no memory in between.
    """

    query_rows: Tensor
    query_slots: Tensor
    key_rows: Tensor
    key_slots: Tensor
    split: Tensor
    key_count: Tensor
    keeps_masks: bool = True
    masks: TileMasks | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, R, K)."""
        documents, rows = self.split.shape
        return documents, rows, self.key_rows.numel() // documents

    def with_masks(self, dtype: torch.dtype, *, causal: bool) -> Tile:
        """The same tile with its masks, built on its device; itself where it keeps none."""
        return replace(self, masks=self._build_masks(dtype, causal)) if self.keeps_masks else self

    def masks_for(self, dtype: torch.dtype, *, causal: bool) -> TileMasks:
        """The masks that it keeps, or masks built for this use. Raises `ValueError` where it keeps some of another dtype."""
        if self.masks is None:
            return self._build_masks(dtype, causal)
        if self.masks.bias.dtype != dtype:
            raise ValueError(f"the layout's masks are of {self.masks.bias.dtype}, q, k and v of {dtype}")
        return self.masks

    def _build_masks(self, dtype: torch.dtype, causal: bool) -> TileMasks:
        key = torch.arange(self.shape[2], device=self.split.device)
        exists = key < self.key_count[:, None, None, None]
        forward = (key < self.split[:, None, :, None]) & exists
        directions = (forward,) if causal else (forward, exists & ~forward)
        unseen = ~forward if causal else ~exists.expand_as(forward)
        zeros = torch.zeros(forward.shape, dtype=dtype, device=forward.device)
        return TileMasks(
            factors=tuple(direction.to(dtype) for direction in directions),
            bias=zeros.masked_fill_(unseen, float("-inf")),
        )


@dataclass(frozen=True, kw_only=True)
class TileRows:
    """Query rows of the documents that go to tiles.

    `rows` int64 [Q] by document and position, and their `split` [Q]; `counts` [D]: how many each document has.
    `key_starts`, `key_counts` [D]: the kept rows of each document.
    """

    rows: NDArray[np.int64]
    split: NDArray[np.int64]
    counts: NDArray[np.int64]
    key_starts: NDArray[np.int64]
    key_counts: NDArray[np.int64]


def build_tiles(rows: TileRows, *, trash_row: int, budget: int, min_rows: int) -> tuple[Tile, ...]:
    """Tiles over all documents of `rows`; padding is written to `trash_row`.

    `budget`: scores per head and tile (B·R·K) to aim at; a document with more scores is cut into chunks of at least
    `min_rows` query rows.
    """
    starts = np.cumsum(rows.counts) - rows.counts
    tiles: list[Tile] = []
    order = np.lexsort((rows.counts, rows.key_counts))[::-1]
    order = order[rows.counts[order] > 0]
    position = 0
    while position < order.size:
        document = order[position]
        count, keys = int(rows.counts[document]), int(rows.key_counts[document])
        if count * keys > budget:
            chunk = max(min_rows, budget // keys)
            bounds = [(first, min(first + chunk, count)) for first in range(0, count, chunk)]
            spans = [
                np.array([[starts[document] + first, starts[document] + last]]) for first, last in bounds
            ]
            tiles += [_tile(rows, order[position : position + 1], span, trash_row) for span in spans]
            position += 1
            continue
        size = _group_size(rows.counts[order[position:]], keys, budget)
        group = order[position : position + size]
        spans_of_group = np.stack([starts[group], starts[group] + rows.counts[group]], axis=1)
        tiles.append(_tile(rows, group, spans_of_group, trash_row))
        position += size
    return _with_bounded_masks(tiles)


def _with_bounded_masks(tiles: list[Tile]) -> tuple[Tile, ...]:
    """The tiles, of which the last ones, of the shortest documents, keep their masks: as many as the bound allows."""
    scores = np.array([np.prod(tile.shape) for tile in tiles], np.int64)
    keeps = np.cumsum(scores[::-1])[::-1] <= _KEPT_SCORES
    return tuple(replace(tile, keeps_masks=bool(k)) for tile, k in zip(tiles, keeps, strict=True))


def _group_size(counts: NDArray[np.int64], keys: int, budget: int) -> int:
    """How many of the next documents, no longer than `keys`, fit a tile together."""
    most_rows = np.maximum.accumulate(counts[: budget // keys + 1])
    area = most_rows * keys * np.arange(1, most_rows.size + 1)
    return max(1, int(np.searchsorted(area, budget, side="right")))


def _tile(rows: TileRows, documents: NDArray[np.int64], spans: NDArray[np.int64], trash_row: int) -> Tile:
    counts, key_counts = spans[:, 1] - spans[:, 0], rows.key_counts[documents]
    query, has_query = _padded(spans[:, 0], counts)
    key, has_key = _padded(rows.key_starts[documents], key_counts)
    query_rows = rows.rows[query]
    return Tile(
        query_rows=torch.from_numpy(query_rows.reshape(-1)),
        query_slots=torch.from_numpy(np.where(has_query, query_rows, trash_row).reshape(-1)),
        key_rows=torch.from_numpy(key.reshape(-1)),
        key_slots=torch.from_numpy(np.where(has_key, key, trash_row).reshape(-1)),
        split=torch.from_numpy(rows.split[query]),
        key_count=torch.from_numpy(key_counts),
    )


def _padded(
    starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Index block [B, max length] of the ranges, padded with each range's start; and bool, True where it is no padding."""
    offset = np.arange(lengths.max())
    exists = offset < lengths[:, None]
    return starts[:, None] + np.where(exists, offset, 0), exists
