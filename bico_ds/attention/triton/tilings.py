"""How the Triton kernels cut their work, by GPU architecture and head dimension.

No GPU has timed these values yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from bico_ds.attention.triton.row_blocks import BlockSizes


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program of a kernel computes at a time: `rows` x `keys` scores, by `warps`, with `stages` loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The tiles of the forward, query-gradient and key-gradient kernels. The first two share their blocks of rows."""

    forward: Tile
    query: Tile
    key: Tile

    def __post_init__(self) -> None:
        assert self.forward.rows == self.query.rows

    @property
    def blocks(self) -> BlockSizes:
        return BlockSizes(rows=self.forward.rows, keys=self.key.keys)


_HOPPER_128 = Tiling(
    forward=Tile(rows=64, keys=64, warps=4, stages=2),
    query=Tile(rows=64, keys=64, warps=8, stages=2),
    key=Tile(rows=64, keys=64, warps=8, stages=2),
)
_SMALL = Tiling(
    forward=Tile(rows=32, keys=16, warps=4, stages=1),
    query=Tile(rows=32, keys=16, warps=4, stages=1),
    key=Tile(rows=16, keys=32, warps=4, stages=1),
)

# By compute capability, and by head dimension as `padded_head_dim` gives it.
TILINGS: dict[tuple[int, int], dict[int, Tiling]] = {
    (8, 0): {32: _HOPPER_128, 64: _HOPPER_128, 128: _HOPPER_128, 256: _SMALL},
    (9, 0): {32: _HOPPER_128, 64: _HOPPER_128, 128: _HOPPER_128, 256: _SMALL},
}


def padded_head_dim(head_dim: int) -> int:
    """Columns that the kernels compute with: each half of a head padded to a power of 2, at least 16."""
    half = head_dim // 2
    return 2 * max(16, 1 << (half - 1).bit_length())


def tiling_of(capability: tuple[int, int] | None, head_dim: int) -> Tiling:
    """The tiling of the newest architecture in the table that is not newer than the GPU's.

    None as `capability`: no GPU; Triton's interpreter, where small tiles reach every branch with short documents.
    """
    if capability is None:
        return _SMALL
    newest = max(known for known in TILINGS if known <= capability)
    return TILINGS[newest][padded_head_dim(head_dim)]
