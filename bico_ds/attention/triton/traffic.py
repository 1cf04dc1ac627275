"""What the Triton attention ops move, by arithmetic, as `Traffic` counts it."""

from __future__ import annotations

from torch import Tensor

from bico_ds.attention.triton.operands import Operands
from bico_ds.common.traffic import Traffic


def forward_traffic(operands: Operands, lse: Tensor) -> Traffic:
    """Of rotating the keys, and of the forward kernel."""
    sizes = _Sizes(operands, lse)
    return Traffic(
        op="attention forward",
        launches=2,
        bytes_read=sizes.keys + sizes.key_tables
        + sizes.queries + sizes.query_tables + sizes.rotated_keys + sizes.keys + sizes.index + sizes.query_blocks,
        bytes_written=sizes.rotated_keys + sizes.queries + sizes.lse,
    )  # fmt: skip


def backward_traffic(operands: Operands, lse: Tensor, key_gradient: Tensor) -> Traffic:
    """Of rotating the keys, of both gradient kernels, and of clearing the live rows of dk and dv."""
    sizes = _Sizes(operands, lse)
    gradients = 2 * operands.num_kept * key_gradient[0].numel() * key_gradient.itemsize
    num_live = len(operands.q) - operands.num_kept if operands.serves_all_rows else 0
    cleared = 2 * num_live * key_gradient[0].numel() * key_gradient.itemsize
    read_by_query = 3 * sizes.queries + sizes.lse + sizes.query_tables + sizes.query_blocks
    written_by_query = sizes.rotated_queries + 2 * sizes.lse + sizes.queries
    read_by_key = sizes.rotated_queries + sizes.queries + 2 * sizes.lse + sizes.key_tables + sizes.key_blocks
    read_by_both = sizes.rotated_keys + sizes.keys + sizes.index
    return Traffic(
        op="attention backward",
        launches=3 + (2 if num_live else 0),
        bytes_read=sizes.keys + sizes.key_tables + read_by_query + read_by_key + 2 * read_by_both
        + (0 if operands.serves_all_rows else gradients),
        bytes_written=sizes.rotated_keys + written_by_query + gradients + cleared,
    )  # fmt: skip


class _Sizes:
    """Bytes of what one launch reads or writes."""

    def __init__(self, operands: Operands, lse: Tensor) -> None:
        queries, itemsize = len(operands.rows), operands.q.itemsize
        heads, dim = operands.q.shape[1:]
        self.queries = queries * heads * dim * itemsize
        self.rotated_queries = operands.directions * self.queries
        self.lse = queries * heads * lse.itemsize
        self.keys = operands.num_kept * operands.k.shape[1] * dim * itemsize
        self.rotated_keys = operands.directions * self.keys
        # Of cos and sin the first half, which the second repeats.
        self.query_tables = queries * dim * itemsize
        self.key_tables = operands.num_kept * dim * itemsize
        self.index = operands.rows.nbytes + operands.split.nbytes
        self.query_blocks, self.key_blocks = operands.query_blocks.nbytes, operands.key_blocks.nbytes
