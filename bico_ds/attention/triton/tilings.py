"""How the Triton kernels cut their work, by GPU architecture and head dimension.

They are chosen without a GPU; an H200 ran those of compute capability 9.0 (docs/benchmarks/gpu.md), and compared no others.
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


def _tiling(*tiles: tuple[int, int, int, int]) -> Tiling:
    """Of the forward, query-gradient and key-gradient kernels: (rows, keys, warps, stages) each."""
    forward, query, key = (Tile(rows=r, keys=k, warps=w, stages=s) for r, k, w, s in tiles)
    return Tiling(forward=forward, query=query, key=key)


_INTERPRETED = _tiling((32, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1))

# Chained products give each warp 16 rows of their first factor (the key-gradient kernel: 16 keys), so 64 rows take 4 warps;
# with 8 half of them would repeat the others' work. 64 rather than 128 rows, because the documents that these kernels are
# for are short, and an architecture has one block size per head dimension.

# mma.sync: 255 registers each leave two programs per multiprocessor. Up to head dimension 128 two fit the smallest
# shared memory, 99 KB of sm_86 and sm_120.
_MMA_SYNC = {
    32: _tiling((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    64: _tiling((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    128: _tiling((64, 32, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    # Accumulators of 64 x 256 fill 4 warps: few keys at a time, and none in flight where the stack would grow.
    256: _tiling((64, 32, 4, 2), (64, 32, 8, 1), (16, 64, 8, 1)),
}

# By compute capability, and by the largest head dimension that a tiling serves. Chosen from what the kernels compile to
# (docs/benchmarks/triton_resources.md): no GPU has compared them with others.
TILINGS: dict[tuple[int, int], dict[int, Tiling]] = {
    (8, 0): _MMA_SYNC,
    (8, 6): _MMA_SYNC,
    # wgmma takes its 64 rows from 4 warps. 255 registers each leave two programs per multiprocessor, without stack.
    (9, 0): {
        32: _tiling((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        64: _tiling((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        # The masks of padding columns need registers, too; 8 warps on 128 rows need fewer for addresses.
        96: _tiling((128, 64, 8, 2), (128, 32, 8, 2), (16, 128, 8, 2)),
        128: _tiling((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
        256: _tiling((64, 32, 4, 2), (64, 32, 8, 1), (32, 64, 8, 1)),
    },
    # tcgen05 is widest at 128 rows, and keeps its accumulators outside of the registers.
    (10, 0): {
        32: _tiling((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        64: _tiling((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        128: _tiling((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1)),
        256: _tiling((128, 32, 8, 1), (128, 32, 8, 1), (32, 64, 8, 1)),
    },
    (12, 0): _MMA_SYNC,
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
        return _INTERPRETED
    tilings = TILINGS[max(known for known in TILINGS if known <= capability)]
    return tilings[min(largest for largest in tilings if head_dim <= largest)]
