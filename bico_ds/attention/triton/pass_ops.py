"""The kernels around the flash passes as `torch.library` ops, which write into tensors that they are given.

On the meta device they compute nothing, and state what they would move (`bico_ds.common.traffic`).

Shape legend: T rows of the batch, R rows of the problem, M of them flipped, H query heads, N key heads, D head dimension,
W columns of a pass's rows: D, or with hidden keys 8 more. lse [T, H] may have any strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bico_ds.attention.triton.tilings import padded_head_dim
from bico_ds.common.traffic import Traffic, report
from bico_ds.native.triton_kernels import Launch

_BLOCK = 32  # rows per program


def rotated_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    key_rows: Tensor | None,
    hidden: Tensor | None,
    places: Tensor | None,
    query_hider: float,
    key_hider: float,
    q1: Tensor,
    k1: Tensor,
    v1: Tensor | None,
    q2: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
) -> Launch:
    """q, k, v [T, heads, D], of strided rows, into inputs of the passes: [R, heads, W], and [M, heads, W]."""
    from bico_ds.attention.triton.pass_kernels import rotated_kernel

    num_rows, H, width = q1.shape
    N = k1.shape[1]
    arguments = {
        **_given(
            q, Q=q, K=k, V=v, COS=cos, SIN=sin, ROWS=rows, KEY_ROWS=key_rows, HIDDEN=hidden, PLACES=places
        ),
        **_given(q, Q1=q1, K1=k1, V1=v1, Q2=q2, K2=k2, V2=v2),
        **{"num_rows": num_rows, "q_row": q.stride(0), "k_row": k.stride(0), "v_row": v.stride(0)},
        **{"query_hider": query_hider, "key_hider": key_hider, "N": N, "WRITES_V": v1 is not None},
        **_constants(q.shape[2], H, width, rows, q2),
    }
    heads = H + N + (N if v1 is not None or v2 is not None else 0)
    return Launch(kernel=rotated_kernel, programs=_blocks(num_rows) * heads, arguments=arguments)


def merged_launch(
    out1: Tensor,
    lse1: Tensor,
    out2: Tensor | None,
    lse2: Tensor | None,
    rows: Tensor | None,
    places: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
) -> Launch:
    """out [T, H, D] and lse from each pass's out [R or M, H, W] and lse [H, R or M]; None: into the first pass's own."""
    from bico_ds.attention.triton.pass_kernels import merged_kernel

    num_rows, H, width = out1.shape
    in_place = out is None or lse is None
    target, target_lse = (out1, lse1.t()) if out is None or lse is None else (out, lse)
    arguments = {
        **_given(out1, OUT1=out1, LSE1=lse1, OUT2=out2, LSE2=lse2, ROWS=rows, PLACES=places),
        **{"OUT": target, "LSE": target_lse, "num_rows": num_rows, "IN_PLACE": in_place},
        **{"num_flipped": 0 if lse2 is None else lse2.shape[1]},
        **{"lse_row": target_lse.stride(0), "lse_head": target_lse.stride(1)},
        **_constants(target.shape[2], H, width, rows, out2),
    }
    return Launch(kernel=merged_kernel, programs=_blocks(num_rows) * H, arguments=arguments)


def gathered_launch(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    places: Tensor | None,
    num_rows: int,
    grad1: Tensor | None,
    out1: Tensor | None,
    lse1: Tensor | None,
    grad2: Tensor | None,
    out2: Tensor | None,
    lse2: Tensor | None,
) -> Launch:
    """Rows of grad and out [T, H, D] and of lse as [R, H, W] and [H, R], and flipped as [M, H, W] and [H, M]."""
    from bico_ds.attention.triton.pass_kernels import gathered_kernel

    H, D = grad.shape[1:]
    width = D if grad1 is None else grad1.shape[2]
    arguments = {
        **_given(grad, GRAD=grad, OUT=out, LSE=lse, ROWS=rows, PLACES=places),
        **_given(grad, GRAD1=grad1, OUT1=out1, LSE1=lse1, GRAD2=grad2, OUT2=out2, LSE2=lse2),
        **{"num_rows": num_rows, "num_flipped": 0 if lse2 is None else lse2.shape[1]},
        **{"lse_row": lse.stride(0), "lse_head": lse.stride(1), "WRITES_FIRST": grad1 is not None},
        **_constants(D, H, width, rows, grad2),
    }
    return Launch(kernel=gathered_kernel, programs=_blocks(num_rows) * H, arguments=arguments)


def summed_launch(
    dq1: Tensor,
    dk1: Tensor,
    dv1: Tensor,
    dq2: Tensor | None,
    dk2: Tensor | None,
    dv2: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    places: Tensor | None,
    adds: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Launch:
    """dq, dk, dv [T, heads, D] from the gradients of each pass's inputs, [R or M, heads, W]; `adds`: dk and dv to theirs."""
    from bico_ds.attention.triton.pass_kernels import summed_kernel

    num_rows, H, width = dq1.shape
    N = dk1.shape[1]
    arguments = {
        **_given(dq1, DQ1=dq1, DK1=dk1, DV1=dv1, DQ2=dq2, DK2=dk2, DV2=dv2, COS=cos, SIN=sin),
        **_given(dq1, ROWS=rows, PLACES=places, DQ=dq, DK=dk, DV=dv),
        **{"num_rows": num_rows, "ADDS": adds, "N": N},
        **_constants(dq.shape[2], H, width, rows, dq2),
    }
    return Launch(kernel=summed_kernel, programs=_blocks(num_rows) * (H + 2 * N), arguments=arguments)


def rotated_traffic(*arguments: Any) -> Traffic:
    q, _, _, cos, _, *indices, _, _, q1, k1, v1, q2, k2, v2 = arguments
    columns = k1.shape[1] * (2 if v1 is not None or v2 is not None else 1) + q1.shape[1]
    read = len(q1) * q.shape[2] * (columns * q.itemsize + cos.itemsize)
    return _traffic("rotated", read + _bytes(indices), _bytes((q1, k1, v1, q2, k2, v2)))


def merged_traffic(*arguments: Any) -> Traffic:
    out1, lse1, out2, _, rows, places, out, _ = arguments
    D = out1.shape[2] if out is None else out.shape[2]
    per_row = out1.shape[1] * (D * out1.itemsize + lse1.itemsize)
    flipped = 0 if out2 is None else len(out2)
    touched = flipped if out is None and out2 is not None else len(out1)
    return _traffic("merged", (touched + flipped) * per_row + _bytes((rows, places)), touched * per_row)


def gathered_traffic(*arguments: Any) -> Traffic:
    grad, out, lse, rows, places, num_rows, *written = arguments
    H, D = grad.shape[1:]
    read = num_rows * H * (D * (grad.itemsize + out.itemsize) + lse.itemsize)
    return _traffic("gathered", read + _bytes((rows, places)), _bytes(written))


def summed_traffic(*arguments: Any) -> Traffic:
    dq1, dk1, _, dq2, *_, cos, _, rows, places, adds, dq, dk, _ = arguments
    D, flipped = dq.shape[2], 0 if dq2 is None else len(dq2)
    queries, keys = dq1.shape[1] * D, 2 * dk1.shape[1] * D
    read = (len(dq1) + flipped) * (queries + keys) * dq1.itemsize + len(dq1) * D * cos.itemsize
    written = len(dq1) * (queries * dq.itemsize + keys * dk.itemsize)
    added = len(dq1) * keys * dk.itemsize if adds else 0
    return _traffic("summed", read + added + _bytes((rows, places)), written)


def _register(name: str, schema: str, launch: Callable[..., Launch], traffic: Callable[..., Traffic]) -> None:
    """The op `bico_ds::passes_NAME`."""
    torch.library.define(f"bico_ds::passes_{name}", f"({schema}) -> ()")

    @torch.library.impl(f"bico_ds::passes_{name}", ("cuda", "cpu"))
    def run(*arguments: Any) -> None:
        with torch.cuda.device_of(arguments[0]):
            launch(*arguments).run()

    @torch.library.register_fake(f"bico_ds::passes_{name}")
    def state(*arguments: Any) -> None:
        report(traffic(*arguments))


_register(
    "rotated",
    "Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? rows, Tensor? key_rows, Tensor? hidden, "
    "Tensor? places, float query_hider, float key_hider, Tensor(a!) q1, Tensor(b!) k1, Tensor(c!)? v1, "
    "Tensor(d!)? q2, Tensor(e!)? k2, Tensor(f!)? v2",
    rotated_launch,
    rotated_traffic,
)
_register(
    "merged",
    "Tensor(a!) out1, Tensor(b!) lse1, Tensor? out2, Tensor? lse2, Tensor? rows, Tensor? places, "
    "Tensor(c!)? out, Tensor(d!)? lse",
    merged_launch,
    merged_traffic,
)
_register(
    "gathered",
    "Tensor grad, Tensor out, Tensor lse, Tensor? rows, Tensor? places, int num_rows, Tensor(a!)? grad1, "
    "Tensor(b!)? out1, Tensor(c!)? lse1, Tensor(d!)? grad2, Tensor(e!)? out2, Tensor(f!)? lse2",
    gathered_launch,
    gathered_traffic,
)
_register(
    "summed",
    "Tensor dq1, Tensor dk1, Tensor dv1, Tensor? dq2, Tensor? dk2, Tensor? dv2, Tensor cos, Tensor sin, "
    "Tensor? rows, Tensor? places, bool adds, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv",
    summed_launch,
    summed_traffic,
)


def _given(any_tensor: Tensor, **tensors: Tensor | None) -> dict[str, Tensor]:
    """Arguments of a launch; a kernel does not touch what stands in for those that are not there."""
    return {name: any_tensor if x is None else x for name, x in tensors.items()}


def _constants(
    head_dim: int, heads: int, width: int, rows: Tensor | None, second: Tensor | None
) -> dict[str, Any]:
    return {
        "DIRECTIONS": 1 if second is None else 2,
        "H": heads,
        "D": head_dim,
        "HALF": padded_head_dim(head_dim) // 2,
        "WIDTH": width,
        "GATHERS": rows is not None,
        "BLOCK": _BLOCK,
    }


def _blocks(rows: int) -> int:
    return -(-rows // _BLOCK)


def _traffic(op: str, read: int, written: int) -> Traffic:
    return Traffic(op=f"passes {op}", launches=1, bytes_read=read, bytes_written=written)


def _bytes(tensors: Any) -> int:
    return sum(x.nbytes for x in tensors if x is not None)
