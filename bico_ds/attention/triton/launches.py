"""The launches of a forward and of a backward pass: kernels, grids and arguments, which tests compile without a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bico_ds.attention.triton.backward import key_gradient_kernel, query_gradient_kernel
from bico_ds.attention.triton.forward import forward_kernel
from bico_ds.attention.triton.operands import Operands
from bico_ds.attention.triton.primitives import rotate_kernel
from bico_ds.attention.triton.tilings import Tile, Tiling, padded_head_dim
from bico_ds.native.triton_kernels import Launch

_ROTATED_ROWS = 32  # rows per program of the kernel that rotates keys


def forward_launches(operands: Operands, tiling: Tiling, out: Tensor, lse: Tensor) -> list[Launch]:
    """Those that write the rows of `out` and `lse`."""
    rotated_keys = _rotated_keys(operands)
    arguments = {
        **_common(operands, rotated_keys),
        **_of_queries(operands, out, lse),
        "BLOCK": tiling.forward.rows,
        "KEYS": tiling.forward.keys,
    }
    programs = len(operands.query_blocks) * operands.q.shape[1]
    forward = _launch(forward_kernel, programs, arguments, tiling.forward)
    return [_rotation(operands, rotated_keys), forward]


def backward_launches(
    operands: Operands,
    tiling: Tiling,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> list[Launch]:
    """Those that write the rows of dq, and write the kept rows of dk and dv, or add to them."""
    (_, H, D), entries = operands.q.shape, len(operands.rows)
    rotated_keys = _rotated_keys(operands)
    both = {
        **_common(operands, rotated_keys),
        "GRAD": grad_out,
        "ROTATED": operands.q.new_empty(operands.directions, H, entries, D),
        "LSE2": lse.new_empty(H, entries),
        "DELTA": lse.new_empty(H, entries),
        "num_entries": entries,
    }
    query = {
        **both,
        **_of_queries(operands, out, lse),
        "DQ": dq,
        "BLOCK": tiling.query.rows,
        "KEYS": tiling.query.keys,
    }
    key = {
        **both,
        "BLOCKS": operands.key_blocks,
        "DK": dk,
        "DV": dv,
        "ADDS": not operands.serves_all_rows,
        "BLOCK": tiling.key.rows,
        "KEYS": tiling.key.keys,
    }
    query_programs = len(operands.query_blocks) * H
    key_programs = len(operands.key_blocks) * operands.k.shape[1]
    return [
        _rotation(operands, rotated_keys),
        _launch(query_gradient_kernel, query_programs, query, tiling.query),
        _launch(key_gradient_kernel, key_programs, key, tiling.key),
    ]


def _launch(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> Launch:
    return Launch(kernel=kernel, programs=programs, arguments=arguments, warps=tile.warps, stages=tile.stages)


def _common(operands: Operands, rotated_keys: Tensor) -> dict[str, Any]:
    """Arguments of all kernels but the first."""
    return {
        "K": rotated_keys,
        "V": operands.v,
        "COS": operands.cos,
        "SIN": operands.sin,
        "ROWS": operands.rows,
        "SPLIT": operands.split,
        "num_kept": operands.num_kept,
        "v_row": operands.v.stride(0),
        "H": operands.q.shape[1],
        **_constants(operands),
    }


def _of_queries(operands: Operands, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """Arguments of the kernels that go by blocks of queries."""
    return {
        "Q": operands.q,
        "BLOCKS": operands.query_blocks,
        "OUT": out,
        "LSE": lse,
        "softmax_scale": operands.scale,
        "q_row": operands.q.stride(0),
        "lse_row": lse.stride(0),
        "lse_head": lse.stride(1),
    }


def _constants(operands: Operands) -> dict[str, int]:
    """Constants of all kernels."""
    _, N, D = operands.k.shape
    return {"DIRECTIONS": operands.directions, "N": N, "D": D, "HALF": padded_head_dim(D) // 2}


def _rotated_keys(operands: Operands) -> Tensor:
    _, N, D = operands.k.shape
    return operands.k.new_empty(operands.directions, N, operands.num_kept, D)


def _rotation(operands: Operands, rotated_keys: Tensor) -> Launch:
    blocks = -(-operands.num_kept // _ROTATED_ROWS)
    arguments = {
        "X": operands.k,
        "COS": operands.cos,
        "SIN": operands.sin,
        "ROTATED": rotated_keys,
        "num_rows": operands.num_kept,
        "x_row": operands.k.stride(0),
        **_constants(operands),
        "BLOCK": _ROTATED_ROWS,
    }
    return Launch(kernel=rotate_kernel, programs=blocks * operands.k.shape[1], arguments=arguments)
