"""The Triton kernels as `torch.library` ops, which write into tensors that they are given.

On the meta device they compute nothing, and state what they would move (`traffic.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bico_ds.attention.inputs import AttentionInputs, AttentionResults, Gradients
from bico_ds.attention.kernels.flash_limits import flash2_refusal, head_dim_refusal
from bico_ds.attention.triton.operands import SCHEMA, Operands
from bico_ds.attention.triton.row_blocks import RowBlocks
from bico_ds.attention.triton.tilings import Tiling, tiling_of
from bico_ds.attention.triton.traffic import backward_traffic, forward_traffic
from bico_ds.common.traffic import report
from bico_ds.native.triton_kernels import is_interpreting, triton_missing

_FORWARD, _BACKWARD = "bico_ds::triton_attention_forward", "bico_ds::triton_attention_backward"
torch.library.define(_FORWARD, f"({SCHEMA}, Tensor(a!) out, Tensor(b!) lse) -> ()")
torch.library.define(
    _BACKWARD,
    f"({SCHEMA}, Tensor out, Tensor lse, Tensor grad_out, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()",
)


def triton_refusal(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Why the Triton kernels cannot serve such inputs, in one clause; None where they can.

    On CUDA the limits are those of FlashAttention-2, and a C compiler is needed. The meta device takes every dtype. A CPU
    takes fp32 and fp16 where Triton's interpreter is on (`TRITON_INTERPRET=1`), which is slow: for tests.
    """
    if device.type == "meta":
        return head_dim_refusal(head_dim, 8, 256)
    if (missing := triton_missing(device)) is not None:
        return missing
    if device.type == "cpu" and is_interpreting():
        if dtype not in (torch.float32, torch.float16):
            return "takes float32 or float16 in Triton's interpreter"
        return head_dim_refusal(head_dim, 8, 256)
    return flash2_refusal(dtype, head_dim, device)


def tiling_on(device: torch.device, head_dim: int) -> Tiling:
    """How the kernels cut their work on this device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return tiling_of(capability, head_dim)


def triton_forward(blocks: RowBlocks, inputs: AttentionInputs, results: AttentionResults) -> None:
    """Write out and lse of the rows in `blocks`."""
    torch.ops.bico_ds.triton_attention_forward(*Operands.of(blocks, inputs), results.out, results.lse)


def triton_backward(
    blocks: RowBlocks,
    inputs: AttentionInputs,
    results: AttentionResults,
    grad_out: Tensor,
    grads: Gradients,
) -> None:
    """Write dq of the rows in `blocks`. If those are all of the batch, write dk and dv too, which are 0 for live rows.

    Else add to dk and dv of kept rows. All three may have rows behind the batch's.
    """
    torch.ops.bico_ds.triton_attention_backward(
        *Operands.of(blocks, inputs), results.out, results.lse, grad_out.contiguous(), *grads
    )


def _tiling(operands: Operands) -> Tiling:
    tiling = tiling_on(operands.q.device, operands.q.shape[2])
    assert operands.sizes == tiling.blocks, "the layout was cut for another kind of GPU"
    return tiling


@torch.library.impl(_FORWARD, ("cuda", "cpu"))
def _forward(*arguments: Any) -> None:
    from bico_ds.attention.triton.launches import forward_launches

    operands, (out, lse) = Operands.split_off(arguments)
    with torch.cuda.device_of(operands.q):
        for launch in forward_launches(operands, _tiling(operands), out, lse):
            launch.run()


@torch.library.impl(_BACKWARD, ("cuda", "cpu"))
def _backward(*arguments: Any) -> None:
    from bico_ds.attention.triton.launches import backward_launches

    operands, (out, lse, grad_out, *grads) = Operands.split_off(arguments)
    if operands.serves_all_rows:
        for grad in grads[1:]:
            grad[operands.num_kept : len(operands.q)].zero_()
    with torch.cuda.device_of(operands.q):
        for launch in backward_launches(operands, _tiling(operands), out, lse, grad_out, *grads):
            launch.run()


@torch.library.register_fake(_FORWARD)
def _fake_forward(*arguments: Any) -> None:
    operands, (_, lse) = Operands.split_off(arguments)
    report(forward_traffic(operands, lse))


@torch.library.register_fake(_BACKWARD)
def _fake_backward(*arguments: Any) -> None:
    operands, (_, lse, _, _, dk, _) = Operands.split_off(arguments)
    report(backward_traffic(operands, lse, dk))
