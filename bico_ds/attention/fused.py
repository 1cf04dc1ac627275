"""The fused CPU attention kernel (native/tiles.cpp), which serves all rows of a batch at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bico_ds.attention.inputs import AttentionInputs, AttentionResults, Gradients
from bico_ds.attention.tiles import TileRows
from bico_ds.native.library import NATIVE_DTYPES, native_refusal


@dataclass(frozen=True, kw_only=True)
class FusedRows:
    """`TileRows` as the kernel reads them, for the documents that have query rows here.

    `rows`, `split` int64 [Q]; `offsets` [D+1] into them; `key_starts`, `key_counts` [D].
    """

    rows: Tensor
    split: Tensor
    offsets: Tensor
    key_starts: Tensor
    key_counts: Tensor

    @staticmethod
    def of(rows: TileRows) -> FusedRows:
        present = rows.counts > 0
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows.counts[present])])
        columns = (rows.rows, rows.split, offsets, rows.key_starts[present], rows.key_counts[present])
        tensors = [torch.from_numpy(np.ascontiguousarray(column)) for column in columns]
        return FusedRows(
            rows=tensors[0],
            split=tensors[1],
            offsets=tensors[2],
            key_starts=tensors[3],
            key_counts=tensors[4],
        )

    def arguments(self) -> tuple[Tensor, ...]:
        return self.rows, self.split, self.offsets, self.key_starts, self.key_counts


def fused_refusal(dtype: torch.dtype) -> str | None:
    """Why the fused kernel cannot serve such inputs on this machine; None where it can."""
    if dtype not in NATIVE_DTYPES:
        return "takes bfloat16 and float32 only"
    return native_refusal() or _product_refusal(dtype)


@functools.cache
def _product_refusal(dtype: torch.dtype) -> str | None:
    """Why not even one row can attend to itself; None where it can.

    The library loads wherever there is AVX-512, but torch's products of bf16 need AVX512-BF16 or AMX, which older server
    CPUs do not have.
    """
    one, first = np.ones(1, np.int64), np.zeros(1, np.int64)
    row = TileRows(rows=first, split=one, counts=one, key_starts=first, key_counts=one)
    q, table = torch.zeros(1, 1, 16, dtype=dtype), torch.zeros(1, 16, dtype=dtype)
    inputs = AttentionInputs(q=q, k=q, v=q, cos=table, sin=table, scale=1.0, causal=True)
    results = AttentionResults(out=torch.empty_like(q), lse=torch.empty(1, 1))
    try:
        fused_forward(FusedRows.of(row), inputs, results)
    except RuntimeError as error:
        name, reason = str(dtype).removeprefix("torch."), str(error).splitlines()[0][:80]
        return f"finds no product of {name} on this CPU ({reason})"
    return None


def fused_forward(rows: FusedRows, inputs: AttentionInputs, results: AttentionResults) -> None:
    """As `dense_forward`, for all tiles at once."""
    torch.ops.bico_ds.tiles_forward(
        *_contiguous(inputs), *rows.arguments(), inputs.scale, inputs.causal, results.out, results.lse
    )


def fused_backward(
    rows: FusedRows, inputs: AttentionInputs, results: AttentionResults, grad_out: Tensor, grads: Gradients
) -> None:
    """As `dense_backward`, for all tiles at once."""
    torch.ops.bico_ds.tiles_backward(
        grad_out.contiguous(),
        *_contiguous(inputs),
        results.out,
        results.lse,
        *rows.arguments(),
        inputs.scale,
        inputs.causal,
        *grads,
    )


def _contiguous(inputs: AttentionInputs) -> list[Tensor]:
    return [x.contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin)]
