"""The Triton kernels prove themselves on a GPU before `auto` uses them there: a small batch, computed twice.

What Triton compiles depends on its version, the driver and the architecture, and a wrong kernel would train in silence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bico_ds.attention.backend import Backend
from bico_ds.attention.inputs import AttentionInputs, AttentionResults
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.kernels.flash_attn2 import FlashAttn2
from bico_ds.attention.layout import TILES_POLICY, build_layout
from bico_ds.attention.oracle import oracle_attention
from bico_ds.attention.passes import HIDDEN_COLUMNS, TORCH_PASSES
from bico_ds.attention.plan import AttentionPlan, build_plan
from bico_ds.attention.triton.ops import tiling_on
from bico_ds.attention.triton.passes import TRITON_PASSES

logger = logging.getLogger(__name__)

# Of the largest entry. Rounding in bf16 makes 0.02 at the most; one wrong row, sign or factor makes 0.3 and more.
_MOST_DIFFERENCE = 0.08
_HEADS, _KEY_HEADS = 4, 2


def blocks_objection(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Why the attention kernels may not serve rows there, as a clause: they differ from the oracle, or fail."""
    policy = replace(TILES_POLICY, blocks=tiling_on(device, head_dim).blocks)
    backend = Backend(kernel=FlashAttn2(), policy=policy)  # which gets no rows
    logger.info("checking the Triton attention kernels on %s (once; compiling takes seconds)", device)
    return _objection(
        dtype, head_dim, device, lambda batch: batch.by(backend), lambda batch: batch.by_oracle()
    )


def passes_objection(
    kernel: CausalKernel, dtype: torch.dtype, head_dim: int, device: torch.device
) -> str | None:
    """The same of the kernels around the passes of `kernel`, which must give what torch's operations around it do.

    With all kept rows in place, with tables of some documents' rows, and with hidden keys, if the kernel takes them: each is
    compiled by itself.
    """
    in_place = replace(TILES_POLICY, flash_from=1)
    can_hide = kernel.refusal(dtype, head_dim + HIDDEN_COLUMNS, device) is None
    # Hidden keys have a table of their own, and leave the other documents to another one.
    tables = (
        replace(in_place, tile_cost=1e9, hidden_cost=1.0) if can_hide else replace(in_place, flash_from=40)
    )
    for policy in (in_place, tables):
        ours, torchs = (
            partial(_Batch.by, backend=Backend(kernel=kernel, policy=policy, passes=passes))
            for passes in (TRITON_PASSES, TORCH_PASSES)
        )
        objection = _objection(dtype, head_dim, device, ours, torchs)
        if objection is not None:
            return objection
    return None


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Random inputs of a plan, on their device."""

    plan: AttentionPlan
    inputs: AttentionInputs
    grad_out: Tensor

    def by(self, backend: Backend) -> list[Tensor]:
        """out and the gradients of q, k, v."""
        layout = build_layout(self.plan, backend.policy).to(self.grad_out.device)
        layout = layout.with_masks(self.grad_out.dtype)
        results = backend.forward(self.inputs, layout)
        rows = self.plan.num_rows
        results = AttentionResults(out=results.out[:rows], lse=results.lse)
        return [results.out, *backend.backward(self.inputs, layout, results, self.grad_out)]

    @torch.enable_grad()
    def by_oracle(self) -> list[Tensor]:
        inputs = self.inputs
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        plan = self.plan.to(self.grad_out.device)
        q, k, v = leaves
        out = oracle_attention(q, k, v, inputs.cos, inputs.sin, plan, inputs.scale)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad_out)]


def _objection(
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    ours: Callable[[_Batch], list[Tensor]],
    other: Callable[[_Batch], list[Tensor]],
) -> str | None:
    live = {"live_document": [0, 0, 2, 2], "live_split": [3, 70, 1, 20]}
    plans = (
        build_plan("bidirectional", kept_lengths=[70, 1, 33, 40], **live),
        build_plan("causal", kept_lengths=[70, 5]),
    )
    for plan in plans:
        batch = _random_batch(plan, dtype, head_dim, device)
        try:
            found, expected = ours(batch), other(batch)
        except (
            Exception
        ) as error:  # of any kind: Triton's compiler, its assembler and the driver raise their own
            reason = (str(error).splitlines() or [""])[0][:100]
            return f"fails on this GPU ({type(error).__name__}: {reason})"
        for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            difference = float((x.float() - y.float()).abs().max() / y.float().abs().max())
            if not difference <= _MOST_DIFFERENCE:
                what = f"{difference:.2g} of its largest entry" if math.isfinite(difference) else "not finite"
                return f"is wrong on this GPU ({plan.mode} {name}: {what})"
    return None


def _random_batch(plan: AttentionPlan, dtype: torch.dtype, head_dim: int, device: torch.device) -> _Batch:
    generator = torch.Generator().manual_seed(head_dim)

    def normal(heads: int) -> Tensor:
        return torch.randn(plan.num_rows, heads, head_dim, generator=generator).to(device, dtype)

    angles = torch.rand(plan.num_rows, head_dim // 2, generator=generator).mul_(2 * math.pi).repeat(1, 2)
    cos, sin = (table.to(device, dtype) for table in (angles.cos(), angles.sin()))
    q, k, v, grad_out = (normal(heads) for heads in (_HEADS, _KEY_HEADS, _KEY_HEADS, _HEADS))
    causal = plan.mode == "causal"
    inputs = AttentionInputs(q=q, k=k, v=v, cos=cos, sin=sin, scale=head_dim**-0.5, causal=causal)
    return _Batch(plan=plan, inputs=inputs, grad_out=grad_out)
