"""Who serves which rows of a batch: dense tiles or the two-pass flash kernel. Decided once a batch, from
measured cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bico_ds.attention.fused import FusedRows
from bico_ds.attention.plan import AttentionPlan, build_plan
from bico_ds.attention.tiles import Tile, TileRows, build_tiles


@dataclass(frozen=True, kw_only=True)
class LayoutPolicy:
    """The measured constants of one machine type (``tools/bench/attention.py``, docs/attention.md).

    ``flash_from``: documents of at least so many kept tokens go to the flash kernel. ``tile_scores``: scores
    a head and tile; small tiles stay in the cache, large ones save launches. ``tile_min_rows``: rows a chunk
    at least. ``fused``: the fused CPU kernel serves what tiles would.
    """

    flash_from: float
    tile_scores: int
    tile_min_rows: int
    fused: bool = False


CPU_FUSED_POLICY = LayoutPolicy(flash_from=math.inf, tile_scores=0, tile_min_rows=0, fused=True)
CPU_POLICY = LayoutPolicy(flash_from=512, tile_scores=16 * 40 * 40, tile_min_rows=32)
CUDA_POLICY = LayoutPolicy(flash_from=1, tile_scores=1 << 20, tile_min_rows=64)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``flash_plan`` describes the documents served by the flash kernel (None: none), whose kept rows are
    ``flash_rows`` (None: all of them, in place); ``fused`` or ``tiles`` serve every other row."""

    flash_plan: AttentionPlan | None
    flash_rows: Tensor | None
    tiles: list[Tile]
    fused: FusedRows | None

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on ``device``."""
        if device.type == "cpu":
            return self
        return Layout(
            flash_plan=None if self.flash_plan is None else self.flash_plan.to(device),
            flash_rows=None if self.flash_rows is None else self.flash_rows.to(device),
            tiles=[tile.to(device) for tile in self.tiles],
            fused=None,
        )


def layout_of(plan: AttentionPlan, policy: LayoutPolicy) -> Layout:
    """Who serves which rows of ``plan``. Built at the first call, which a loader's worker may make, and kept
    in it."""
    if policy not in plan.derived:
        layout = _build_layout(plan.on_host(), policy)
        plan.derived[policy] = layout.to(plan.cu_seqlens.device)
    return plan.derived[policy]


def _build_layout(plan: AttentionPlan, policy: LayoutPolicy) -> Layout:
    cu_seqlens = plan.cu_seqlens.numpy().astype(np.int64)
    kept = np.diff(cu_seqlens)
    long = kept >= policy.flash_from
    rows = _tile_rows(plan, cu_seqlens, kept, long)
    fused = FusedRows.of(rows) if policy.fused and rows.rows.size else None
    tiles = [] if policy.fused else _tiles(rows, plan, policy)
    if not long.any():
        return Layout(flash_plan=None, flash_rows=None, tiles=tiles, fused=fused)
    if long.all():
        return Layout(flash_plan=plan, flash_rows=None, tiles=tiles, fused=fused)
    flash_rows = torch.from_numpy(np.flatnonzero(np.repeat(long, kept)))
    flash_plan = build_plan(plan.mode, kept_lengths=kept[long])
    return Layout(flash_plan=flash_plan, flash_rows=flash_rows, tiles=tiles, fused=fused)


def _tiles(rows: TileRows, plan: AttentionPlan, policy: LayoutPolicy) -> list[Tile]:
    return build_tiles(
        rows, trash_row=plan.num_rows, budget=policy.tile_scores, min_rows=policy.tile_min_rows
    )


def _tile_rows(
    plan: AttentionPlan, cu_seqlens: NDArray[np.int64], kept: NDArray[np.int64], long: NDArray[np.bool_]
) -> TileRows:
    """Kept rows of short documents and the live rows of all, by document and position."""
    document = np.repeat(np.arange(kept.size), kept)
    split = np.arange(plan.num_kept) - cu_seqlens[document] + 1
    short = np.flatnonzero(~long[document])
    documents = np.concatenate([document[short], plan.live_document.numpy()])
    rows = np.concatenate([short, np.arange(plan.num_kept, plan.num_rows)])
    splits = np.concatenate([split[short], plan.live_split.numpy()])
    order = np.lexsort((rows, splits, documents))
    return TileRows(
        rows=rows[order],
        split=splits[order],
        counts=np.bincount(documents, minlength=kept.size),
        key_starts=cu_seqlens[:-1],
        key_counts=kept,
    )
