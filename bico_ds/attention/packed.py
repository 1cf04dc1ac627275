"""The op: ``packed_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bico_ds.attention.dense import DenseInputs
from bico_ds.attention.engine import Engine
from bico_ds.attention.kernels.cpu_flash import CpuFlash
from bico_ds.attention.layout import CPU_POLICY
from bico_ds.attention.oracle import oracle_attention
from bico_ds.attention.plan import AttentionPlan


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one packed batch, causal or bidirectional as the plan says.

    q [T, Hq, Dh], k and v [T, Hkv, Dh], un-rotated; cos, sin [T, Dh] as Hugging Face's rotary embedding gives them
    (halves duplicated, rotate_half convention). T = plan.num_rows. Returns out [T, Hq, Dh].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "oracle":
        return oracle_attention(q, k, v, cos, sin, plan, scale)
    engine = Engine(kernel=CpuFlash(), policy=CPU_POLICY)
    return _PackedAttention.apply(q, k, v, cos.to(q.dtype), sin.to(q.dtype), plan, scale, engine)


class _PackedAttention(Function):
    """Both passes and the dense tiles under one backward. Saves raw q, k, v, the merged out and the merged lse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: AttentionPlan,
        scale: float,
        engine: Engine,
    ) -> Tensor:
        causal = plan.mode == "causal"
        inputs = DenseInputs(q=q, k=k, v=v, cos=cos, sin=sin, scale=scale, causal=causal)
        out, lse = engine.forward(inputs, plan)
        out = out[: plan.num_rows]
        ctx.save_for_backward(q, k, v, cos, sin, out, lse)
        ctx.settings = plan, scale, engine
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, out, lse = ctx.saved_tensors
        plan, scale, engine = ctx.settings
        causal = plan.mode == "causal"
        inputs = DenseInputs(q=q, k=k, v=v, cos=cos, sin=sin, scale=scale, causal=causal)
        dq, dk, dv = engine.backward(grad_out, inputs, plan, out, lse)
        return dq, dk, dv, None, None, None, None, None
