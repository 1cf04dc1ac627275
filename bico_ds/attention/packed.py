"""The attention of a packed batch, as one differentiable operation: `packed_attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bico_ds.attention.backend import Backend
from bico_ds.attention.backends import resolve
from bico_ds.attention.inputs import AttentionInputs, AttentionResults
from bico_ds.attention.layout import Layout, build_layout
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
    backend: str | Backend = "auto",
    layout: Layout | None = None,
) -> Tensor:
    """Attention of one packed batch, causal or bidirectional by the plan's mode.

    q [T, Hq, Dh], k and v [T, Hkv, Dh], un-rotated; cos, sin [T, Dh] as Hugging Face's rotary embedding gives
    them (halves duplicated, rotate_half convention). T = plan.num_rows. Returns out [T, Hq, Dh].

    `backend`: by name as in a recipe; or one that another caller has made.

    `layout`: what `build_layout` made of the plan by the backend's policy, on q's device; the oracle needs none. Without
    one it is built for this call, on the CPU, to which the plan is copied: slow, for tests and single calls.

    Raises `ValueError` where shapes or dtypes do not fit each other, Dh is no multiple of 8, the backend cannot serve them,
    or the layout is another backend's or another batch's.
    """
    _check_shapes(q, k, v, cos, sin, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    made = resolve(backend, q.dtype, q.shape[-1], q.device) if isinstance(backend, str) else backend
    if made is None:
        return oracle_attention(q, k, v, cos, sin, plan, scale)
    return run_packed_attention(q, k, v, cos, sin, plan, scale=scale, backend=made, layout=layout)


def run_packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    backend: Backend,
    layout: Layout | None = None,
) -> Tensor:
    """`packed_attention` with a given backend, its shapes and dtypes unchecked."""
    if layout is None:
        layout = build_layout(plan.to("cpu"), backend.policy).to(q.device).with_masks(q.dtype)
    layout.check(plan, backend.policy)
    return _PackedAttention.apply(q, k, v, cos.to(q.dtype), sin.to(q.dtype), scale, backend, layout)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> None:
    rows, heads, head_dim = q.shape
    if rows != plan.num_rows:
        raise ValueError(
            f"q has {rows} rows, the plan {plan.num_rows} ({plan.num_kept} kept, {plan.num_live} live)"
        )
    if k.shape != v.shape or k.shape[::2] != (rows, head_dim):
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    if heads % k.shape[1]:
        raise ValueError(f"{heads} query heads are no multiple of {k.shape[1]} key heads")
    if cos.shape != (rows, head_dim) or sin.shape != (rows, head_dim):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {(rows, head_dim)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if head_dim % 8:
        raise ValueError(f"head dimension must be a multiple of 8, got {head_dim}")


class _PackedAttention(Function):
    """Flash passes, tiles and the fused kernel under one backward.

    Saves raw q, k, v, the merged out and the merged lse.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        backend: Backend,
        layout: Layout,
    ) -> Tensor:
        causal = layout.outline.mode == "causal"
        inputs = AttentionInputs(q=q, k=k, v=v, cos=cos, sin=sin, scale=scale, causal=causal)
        results = backend.forward(inputs, layout)
        out = results.out[: layout.outline.num_rows]
        ctx.save_for_backward(q, k, v, cos, sin, out, results.lse)
        ctx.settings = scale, causal, backend, layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, out, lse = ctx.saved_tensors
        scale, causal, backend, layout = ctx.settings
        inputs = AttentionInputs(q=q, k=k, v=v, cos=cos, sin=sin, scale=scale, causal=causal)
        grads = backend.backward(inputs, layout, AttentionResults(out=out, lse=lse), grad_out)
        return *grads, None, None, None, None, None
