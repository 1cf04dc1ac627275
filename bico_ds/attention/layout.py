"""Which rows of a batch the fused CPU kernel serves, which the Triton kernels, dense tiles, or the two-pass flash kernel.

Decided once per batch, from the costs in a policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bico_ds.attention.fused import FusedRows
from bico_ds.attention.plan import AttentionPlan, Mode, PlanOutline, build_plan, map_tensors
from bico_ds.attention.tiles import Tile, TileRows, build_tiles
from bico_ds.attention.triton.row_blocks import BlockSizes, RowBlocks


@dataclass(frozen=True, kw_only=True)
class LayoutPolicy:
    """The constants of one machine type: measured on CPUs, estimated for CUDA (see below).

    `flash_from`: documents of at least this many kept tokens go to the flash kernel; `causal_flash_from`: those of causal
    batches, where it is another number. `tile_scores`: scores per head and tile to aim at; small tiles stay in the cache,
    large ones save launches. `tile_min_rows`: the least rows per chunk of a document that is too large for one tile.
    `fused`: the fused CPU kernel serves what tiles would; `blocks`: the Triton kernels do, in blocks of these sizes.

    A document's live rows go through the flash kernel too, as hidden keys, where that is cheaper than tiles:
    `tile_cost` and `hidden_cost` are the costs of a (query, key) pair in tiles and with hidden keys, in units of
    plain two-pass flash.

    `span_flash_from`: spans of at least this many live rows go to the flash kernel, if causal documents of as many do.
    """

    flash_from: float
    tile_scores: int
    tile_min_rows: int
    fused: bool = False
    blocks: BlockSizes | None = None
    causal_flash_from: float | None = None
    tile_cost: float = 1.0
    hidden_cost: float = math.inf
    span_flash_from: float = 1

    def flash_from_in(self, mode: Mode) -> float:
        """`flash_from` of this mode."""
        if mode == "causal" and self.causal_flash_from is not None:
            return self.causal_flash_from
        return self.flash_from


# Measured (docs/benchmarks/attention.md): `flash_from`, in fp32 and in bf16, where the flash kernel is slow on short rows;
# the tile size; the two costs, in fp32 alone. Not measured: `tile_min_rows`, and dtypes that take another's constants.
CPU_FUSED_POLICY = LayoutPolicy(flash_from=math.inf, tile_scores=0, tile_min_rows=0, fused=True)
CPU_POLICY = LayoutPolicy(
    flash_from=64, tile_scores=16 * 40 * 40, tile_min_rows=32, tile_cost=6.0, hidden_cost=1.4
)
CPU_HALF_POLICY = replace(CPU_POLICY, flash_from=640)

# Estimates, all of them, for GPUs that tools/bench/gpu_policy.py has not measured: so far that is every one.
# By these two costs hidden keys are never the cheaper ones. Spans are many and short, and FlashAttention-2's backward kernel
# has 128 rows of sums in fp32 for each sequence, beside its own.
CUDA_POLICY = LayoutPolicy(
    flash_from=1,
    tile_scores=1 << 20,
    tile_min_rows=64,
    tile_cost=5.0,
    hidden_cost=1.6,
    span_flash_from=128,
)
TILES_POLICY = replace(CUDA_POLICY, flash_from=math.inf, hidden_cost=math.inf)  # no flash kernel at all


@dataclass(frozen=True, kw_only=True)
class FlashRows:
    """Documents served by two flash passes, as the kernel sees them: `plan` over their rows.

    `query_rows` int64 [N]: where each row's query lies in the batch, by document and position; `key_rows` [N]: where its
    key and value lie. None: all kept rows of the batch, where they are. `hidden` bool [N]: rows that are queries only,
    live placeholders (their key row is their document's first); None: there are none.
    """

    plan: AttentionPlan
    query_rows: Tensor | None = None
    key_rows: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SpanRows:
    """Live rows that see themselves and the earlier rows of their span, besides the kept keys.

    `rows` int64 [P]: where the rows of spans of two and more lie in the batch; `layout`: of the causal batch that they are
    by themselves, by the same policy but for `span_flash_from`; None: there are none. `lone` int64 [L]: the rows that are a
    span each. What these see is elementwise, and reaches no kernel: those of flash-attn have failed in the backward pass
    of sequences of one token (its issues 334 and 1537).
    """

    rows: Tensor
    layout: Layout | None
    lone: Tensor

    def with_masks(self, dtype: torch.dtype) -> SpanRows:
        """As `Layout.with_masks`."""
        return self if self.layout is None else replace(self, layout=self.layout.with_masks(dtype))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which kernel serves which rows of a batch; made by `build_layout` by `policy`, for a plan of this `outline`.

    `flash` holds at most one group with hidden keys and one without; `fused`, `blocks` or `tiles` serve every other row.
    All of these take kept rows as keys alone; `spans` is what live rows see of each other, None: nothing.
    """

    policy: LayoutPolicy
    outline: PlanOutline
    flash: tuple[FlashRows, ...]
    tiles: tuple[Tile, ...]
    fused: FusedRows | None
    blocks: RowBlocks | None
    spans: SpanRows | None

    @property
    def flash_serves_all_kept(self) -> bool:
        """All kept rows of the batch, in place, through the two flash passes; what serves others serves live rows."""
        return len(self.flash) == 1 and self.flash[0].query_rows is None

    @property
    def is_one_flash_problem(self) -> bool:
        """All rows of the batch, in place, through the two flash passes: results need no gathering."""
        return self.flash_serves_all_kept and not self.tiles and self.fused is None and self.blocks is None

    @property
    def is_one_table_of_blocks(self) -> bool:
        """All rows of the batch through the Triton kernels, which then write every gradient, and add to none."""
        return self.blocks is not None and not self.flash

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """The same layout with its tensors on `device`."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def with_masks(self, dtype: torch.dtype) -> Layout:
        """The same layout with the masks of those tiles that keep them, for q, k, v of this dtype.

        The model calls it once per batch, on the device where the layers use the masks; without it every use of a tile
        builds its own.
        """
        causal = self.outline.mode == "causal"
        tiles = tuple(tile.with_masks(dtype, causal=causal) for tile in self.tiles)
        return replace(self, tiles=tiles, spans=None if self.spans is None else self.spans.with_masks(dtype))

    def check(self, plan: AttentionPlan, policy: LayoutPolicy) -> None:
        """Raise `ValueError` where it was built by another policy, or for a plan that differs in its outline."""
        if self.policy != policy:
            raise ValueError(
                f"the layout was built by {self.policy}, but this attention backend needs {policy}: "
                "build it by the policy of the backend that `resolve` returns"
            )
        if self.outline != plan.outline:
            raise ValueError(f"the layout was built for another batch: {self.outline}, not {plan.outline}")


def build_layout(plan: AttentionPlan, policy: LayoutPolicy) -> Layout:
    """Assign each row of `plan`, whose tensors are on the CPU. Called once per batch, by a worker of the loader."""
    kept = np.diff(plan.cu_seqlens.numpy()).astype(np.int64)
    live = np.bincount(plan.live_document.numpy(), minlength=kept.size)
    with_hidden = _hides_keys(kept, live, policy)
    plain = (kept >= policy.flash_from_in(plan.mode)) & ~with_hidden
    rows = _RowTable(plan, kept)
    flash = []
    if plain.all():
        flash.append(FlashRows(plan=plan))
    elif plain.any():
        flash.append(_flash_rows(plan, rows, rows.select(plain, kept=True)))
    if with_hidden.any():
        flash.append(_flash_rows(plan, rows, rows.select(with_hidden, kept=True, live=True)))
    rest = rows.tile_rows(
        rows.select(~plain & ~with_hidden, kept=True) | rows.select(~with_hidden, live=True)
    )
    tiles: tuple[Tile, ...] = ()
    if not policy.fused and policy.blocks is None:
        tiles = build_tiles(
            rest, trash_row=plan.num_rows, budget=policy.tile_scores, min_rows=policy.tile_min_rows
        )
    return Layout(
        policy=policy,
        outline=plan.outline,
        flash=tuple(flash),
        tiles=tiles,
        fused=FusedRows.of(rest) if policy.fused and rest.rows.size else None,
        blocks=RowBlocks.of(rest, policy.blocks) if policy.blocks and rest.rows.size else None,
        spans=_span_rows(plan, policy),
    )


def _span_rows(plan: AttentionPlan, policy: LayoutPolicy) -> SpanRows | None:
    if plan.span_cu_seqlens is None or not plan.num_live:
        return None
    lengths = np.diff(plan.span_cu_seqlens.numpy())
    is_lone = np.repeat(lengths == 1, lengths)
    rows = torch.arange(plan.num_kept, plan.num_rows)
    longer = lengths[lengths > 1]
    flash_from = max(policy.flash_from_in("causal"), policy.span_flash_from)
    of_spans = replace(policy, causal_flash_from=flash_from)
    layout = build_layout(build_plan("causal", kept_lengths=longer), of_spans) if longer.size else None
    return SpanRows(rows=rows[~is_lone], layout=layout, lone=rows[is_lone])


def _hides_keys(kept: NDArray[np.int64], live: NDArray[np.int64], policy: LayoutPolicy) -> NDArray[np.bool_]:
    """Documents whose live rows are cheaper as hidden keys of a larger flash problem than in tiles."""
    if math.isinf(policy.hidden_cost):
        return np.zeros(kept.size, np.bool_)
    rows = (kept + live).astype(np.float64)
    apart = kept.astype(np.float64) ** 2 + policy.tile_cost * live * kept
    return (live > 0) & (rows >= policy.flash_from) & (policy.hidden_cost * rows**2 < apart)


class _RowTable:
    """Every row of a plan with its document and split, by document and position."""

    def __init__(self, plan: AttentionPlan, kept: NDArray[np.int64]) -> None:
        self.kept, self.num_kept = kept, plan.num_kept
        self.starts = np.cumsum(kept) - kept
        document = np.repeat(np.arange(kept.size), kept)
        documents = np.concatenate([document, plan.live_document.numpy()])
        splits = np.concatenate(
            [np.arange(plan.num_kept) - self.starts[document] + 1, plan.live_split.numpy()]
        )
        rows = np.arange(plan.num_rows)
        order = np.lexsort((rows, splits, documents))
        self.row, self.document, self.split = rows[order], documents[order], splits[order]

    def select(
        self, documents: NDArray[np.bool_], *, kept: bool = False, live: bool = False
    ) -> NDArray[np.bool_]:
        """Kept and live rows of the given documents."""
        wanted = np.where(self.row < self.num_kept, kept, live)
        return documents[self.document] & wanted

    def tile_rows(self, chosen: NDArray[np.bool_]) -> TileRows:
        return TileRows(
            rows=self.row[chosen],
            split=self.split[chosen],
            counts=np.bincount(self.document[chosen], minlength=self.kept.size),
            key_starts=self.starts,
            key_counts=self.kept,
        )


def _flash_rows(plan: AttentionPlan, rows: _RowTable, chosen: NDArray[np.bool_]) -> FlashRows:
    query_rows, document = rows.row[chosen], rows.document[chosen]
    hidden = query_rows >= plan.num_kept
    lengths = np.bincount(document, minlength=rows.kept.size)
    return FlashRows(
        plan=build_plan(plan.mode, kept_lengths=lengths[lengths > 0]),
        query_rows=torch.from_numpy(query_rows),
        key_rows=torch.from_numpy(np.where(hidden, rows.starts[document], query_rows)),
        hidden=torch.from_numpy(hidden) if hidden.any() else None,
    )
