"""What both Triton ops read."""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from bico_ds.attention.inputs import AttentionInputs
from bico_ds.attention.triton.row_blocks import BlockSizes, RowBlocks


class Operands(NamedTuple):
    """`AttentionInputs` and `RowBlocks`, flat, in the order of the ops' schemas.

    q, k, v may have strided rows, the heads of which lie in one piece.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    rows: Tensor
    split: Tensor
    query_blocks: Tensor
    key_blocks: Tensor
    num_kept: int
    block_rows: int
    block_keys: int
    scale: float
    causal: bool

    @staticmethod
    def of(blocks: RowBlocks, inputs: AttentionInputs) -> Operands:
        return Operands(
            q=with_packed_heads(inputs.q),
            k=with_packed_heads(inputs.k),
            v=with_packed_heads(inputs.v),
            cos=inputs.cos.contiguous(),
            sin=inputs.sin.contiguous(),
            rows=blocks.rows,
            split=blocks.split,
            query_blocks=blocks.query_blocks,
            key_blocks=blocks.key_blocks,
            num_kept=blocks.num_kept,
            block_rows=blocks.sizes.rows,
            block_keys=blocks.sizes.keys,
            scale=inputs.scale,
            causal=inputs.causal,
        )

    @staticmethod
    def split_off(arguments: tuple[Any, ...]) -> tuple[Operands, tuple[Any, ...]]:
        """The operands that begin an op's arguments, and the other arguments."""
        count = len(Operands._fields)
        return Operands(*arguments[:count]), arguments[count:]

    @property
    def sizes(self) -> BlockSizes:
        return BlockSizes(rows=self.block_rows, keys=self.block_keys)

    @property
    def directions(self) -> int:
        return 1 if self.causal else 2

    @property
    def serves_all_rows(self) -> bool:
        """Whether the table holds every row of the batch."""
        return len(self.rows) == len(self.q)


SCHEMA = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(Operands).items())


def with_packed_heads(x: Tensor) -> Tensor:
    """x [T, H, D] itself where each row lies in one piece, as in a projection of q, k and v at once; else a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
