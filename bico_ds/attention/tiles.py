"""Layout of dense tiles: which documents share one padded block of scores. Index arithmetic only, once a
batch.

A tile holds B documents of like size as a block ``[B, R, K]``: R query rows (kept and live, padded) against
K kept keys (padded). A document too large for one tile gets several, each a chunk of its query rows against
all its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bico_ds.attention.plan import map_fields

# Scores a head of all tiles that keep their masks: three masks, so 24 MB at most in bf16 and 48 in fp32.
_KEPT_SCORES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One padded block of B documents, R query rows and K keys each.

    ``query_rows`` int64 [B·R], ``key_rows`` int64 [B·K]: where each row is read in the batch; padding
    repeats the document's first row. ``query_slots`` [B·R], ``key_slots`` [B·K]: where results are written;
    padding goes to a trash row behind the batch (index T). ``split`` [B, R]: how many keys of the document
    take the forward rotation; ``key_count`` [B]: keys that exist. ``keeps_masks``: its masks are built once for
    all layers; else at each use, so that long documents with many live rows need no memory for them.
    """

    query_rows: Tensor
    query_slots: Tensor
    key_rows: Tensor
    key_slots: Tensor
    split: Tensor
    key_count: Tensor
    keeps_masks: bool = True
    _masks: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, R, K)."""
        documents, rows = self.split.shape
        return documents, rows, self.key_rows.numel() // documents

    def map_tensors(self, transform: Callable[[Tensor], Tensor]) -> Tile:
        """The same tile with every tensor transformed."""
        return replace(map_fields(self, transform), _masks={})

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors (1 or 0) of the forward and of the reverse scores, [B, 1, R, K]."""
        return self._kept(dtype, lambda: self._factors(dtype))

    def bias(self, dtype: torch.dtype, causal: bool) -> Tensor:
        """0 where a query sees a key, else -inf: [B, 1, R, K]."""
        return self._kept((dtype, causal), lambda: self._bias(dtype, causal))

    def _kept(self, key: object, build: Callable[[], Any]) -> Any:
        """Built once for all layers, where the tile keeps its masks."""
        if not self.keeps_masks:
            return build()
        if key not in self._masks:
            self._masks[key] = build()
        return self._masks[key]

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        forward, exists = self._forward_keys()
        return forward.to(dtype), (exists & ~forward).to(dtype)

    def _bias(self, dtype: torch.dtype, causal: bool) -> Tensor:
        forward, exists = self._forward_keys()
        hidden = ~forward if causal else ~exists.expand_as(forward)
        zeros = torch.zeros(forward.shape, dtype=dtype, device=forward.device)
        return zeros.masked_fill_(hidden, float("-inf"))

    def _forward_keys(self) -> tuple[Tensor, Tensor]:
        """Keys before the split, bool [B, 1, R, K], and keys that exist, bool [B, 1, 1, K]."""
        key = torch.arange(self.shape[2], device=self.split.device)
        exists = key < self.key_count[:, None, None, None]
        return (key < self.split[:, None, :, None]) & exists, exists


@dataclass(frozen=True, kw_only=True)
class TileRows:
    """Query rows of the documents that go to tiles: ``rows`` int64 [Q] by document and position, their
    ``split`` [Q], and ``counts`` [D], how many each document has. ``key_starts``, ``key_counts`` [D]: its
    kept rows."""

    rows: NDArray[np.int64]
    split: NDArray[np.int64]
    counts: NDArray[np.int64]
    key_starts: NDArray[np.int64]
    key_counts: NDArray[np.int64]


def build_tiles(rows: TileRows, *, trash_row: int, budget: int, min_rows: int) -> list[Tile]:
    """Tiles over all documents of ``rows``. ``budget``: scores a head and tile (B·R·K) to aim at."""
    starts = np.cumsum(rows.counts) - rows.counts
    tiles = []
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


def _with_bounded_masks(tiles: list[Tile]) -> list[Tile]:
    """The tiles, of which the last ones, of the shortest documents, keep their masks: as many as the bound allows."""
    scores = np.array([np.prod(tile.shape) for tile in tiles], np.int64)
    keeps = np.cumsum(scores[::-1])[::-1] <= _KEPT_SCORES
    return [replace(tile, keeps_masks=bool(k)) for tile, k in zip(tiles, keeps, strict=True)]


def _group_size(counts: NDArray[np.int64], keys: int, budget: int) -> int:
    """How many of the next documents, no longer than ``keys``, fit a tile together."""
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
    """Index block [B, max length] of the ranges, padding repeats each range's start; and where it is no
    padding."""
    offset = np.arange(lengths.max())
    exists = offset < lengths[:, None]
    return starts[:, None] + np.where(exists, offset, 0), exists
