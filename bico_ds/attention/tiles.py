"""Layout of dense tiles: which documents share one padded block of scores. Index arithmetic only, once a
batch.

A tile holds B documents of like size as a block ``[B, R, K]``: R query rows (kept and live, padded) against
K kept keys (padded). A document too large for one tile gets several, each a chunk of its query rows against
all its keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One padded block of B documents, R query rows and K keys each.

    ``query_rows`` int64 [B·R], ``key_rows`` int64 [B·K]: where each row is read in the batch; padding
    repeats the document's first row. ``query_slots`` [B·R], ``key_slots`` [B·K]: where results are written;
    padding goes to a trash row behind the batch (index T). ``split`` [B, R]: how many keys of the document
    take the forward rotation; ``key_count`` [B]: keys that exist.
    """

    query_rows: Tensor
    query_slots: Tensor
    key_rows: Tensor
    key_slots: Tensor
    split: Tensor
    key_count: Tensor
    _cache: dict[object, tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, R, K)."""
        documents, rows = self.split.shape
        return documents, rows, self.key_rows.numel() // documents

    def to(self, device: torch.device) -> Tile:
        """The same tile with its tensors on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: x.to(device) for name, x in moved.items() if isinstance(x, Tensor)}, _cache={}
        )

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors (1 or 0) of the forward and of the reverse scores, [B, 1, R, K]. Built once for all
        layers."""
        if dtype not in self._cache:
            forward, exists = self._forward_keys()
            self._cache[dtype] = (forward.to(dtype), (exists & ~forward).to(dtype))
        forward_factor, reverse_factor = self._cache[dtype]
        return forward_factor, reverse_factor

    def bias(self, dtype: torch.dtype, causal: bool) -> Tensor:
        """0 where a query sees a key, else -inf: [B, 1, R, K]. Built once for all layers."""
        if (dtype, causal) not in self._cache:
            forward, exists = self._forward_keys()
            hidden = ~forward if causal else ~exists.expand_as(forward)
            zeros = torch.zeros(forward.shape, dtype=dtype, device=forward.device)
            self._cache[dtype, causal] = (zeros.masked_fill_(hidden, float("-inf")),)
        return self._cache[dtype, causal][0]

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
    return tiles


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
