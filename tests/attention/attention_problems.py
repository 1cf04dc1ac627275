"""Random attention problems in two forms: the full documents with their masks, and the packed rows of a model's batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from bico_ds.attention.kernels.cpu_flash import CpuFlash
from bico_ds.attention.oracle import dense_attention
from bico_ds.attention.plan import AttentionPlan, build_plan


@dataclass(frozen=True, kw_only=True)
class Problem:
    """N original tokens. `packed_row[t]` is token t's row in the packed batch, -1 where it is dropped."""

    q: Tensor  # [N, Hq, D]
    k: Tensor  # [N, Hkv, D]
    v: Tensor
    cos: Tensor  # [N, D]
    sin: Tensor
    grad_out: Tensor  # [N, Hq, D], zero for dropped tokens
    document: Tensor  # [N]
    position: Tensor  # [N]
    masked: Tensor  # bool [N]
    span: Tensor | None  # [N], of live tokens; -1 elsewhere
    plan: AttentionPlan
    token_of_row: Tensor  # [T]

    def to(self, dtype: torch.dtype) -> Problem:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: x.to(dtype) for n, x in moved.items() if n in FLOATS})

    def dense(self) -> list[Tensor]:
        """Undropped, by the formula in fp64: out and gradients of q, k, v, of all N tokens."""
        inputs = [x.double().requires_grad_() for x in (self.q, self.k, self.v)]
        out = self._attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad_out.double())]

    def dense_rows(self) -> list[Tensor]:
        """`dense`, of the T rows alone."""
        return [x[self.token_of_row] for x in self.dense()]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(
            *(x.double() for x in (q, k, v)),
            self.cos,
            self.sin,
            document=self.document,
            position=self.position,
            is_key=~self.masked,
            span=self.span,
            causal=self.plan.mode == "causal",
        )

    def packed(self, attend, **kwargs) -> list[Tensor]:
        """Through the packed op: out and gradients of q, k, v, of the T rows, in their dtype."""
        rows = self.token_of_row
        inputs = [x[rows].detach().requires_grad_() for x in (self.q, self.k, self.v)]
        out = attend(*inputs, self.cos[rows], self.sin[rows], self.plan, **kwargs)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad_out[rows])]

    def rounding_sizes(self) -> list[Tensor]:
        """[T, H, 1] for out and the gradients of q, k, v: what a rounding error of each is relative to, at least.

        dq_m = D^-1/2 sum_n p_mn ds_mn k_n, where ds_mn = grad_out_m . v_n - grad_out_m . out_m, and dk_n alike. Two
        errors do not shrink with the gradient: that of the two products, which cancel where p is near 1, and that of
        the score, which the softmax makes a relative error of p (a score of 8 in bf16 is known to 0.02). Errors of sums
        grow as the root of the sum of their terms' squares. The result is at least 1, the size of the inputs.
        """
        group = self.q.shape[1] // self.k.shape[1]
        q, grad_out = self.q.double(), self.grad_out.double()
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (self.k, self.v))
        one_hot = torch.eye(len(v), dtype=torch.float64)[:, None].expand(-1, v.shape[1], -1)
        p, out = self._attend(q, k, one_hot), self._attend(q, k, v)  # [N, Hq, N] and [N, Hq, D]
        over_keys = lambda a, b: torch.einsum("mhd,nhd->mhn", a, b)  # noqa: E731
        products = over_keys(grad_out**2, v**2) + (grad_out * out).square().sum(-1, keepdim=True)
        ds = over_keys(grad_out, v) - (grad_out * out).sum(-1, keepdim=True)
        scores = over_keys(q**2, k**2) / q.shape[-1]
        errors = p**2 * (products + ds**2 * (1 + scores)) / q.shape[-1]
        dq = torch.einsum("mhn,nh->mh", errors, k.square().amax(-1))
        dk = torch.einsum("mhn,mh->nh", errors, q.square().amax(-1)).unflatten(1, (-1, group)).sum(-1)
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        return [one, *(x[self.token_of_row, :, None].sqrt().clamp_min(1.0) for x in (dq, dk)), one]


class NoKeyMask(CpuFlash):
    """A kernel like the CUDA ones, which take no key mask: hidden keys must come as a wider head."""

    hides_keys = False


FLOATS = ("q", "k", "v", "cos", "sin", "grad_out")


def make_problem(
    lengths,
    *,
    seed=0,
    mask_rate=0.15,
    mode="bidirectional",
    heads=(4, 2),
    head_dim=16,
    rotary_factor=1.0,
    position_shift=0,
    mask=None,
    spans=None,
) -> Problem:
    """Documents of the given lengths, masked i.i.d. (never their first token) or by `mask`, in fp64.

    `spans`: of the live tokens, by run of masked tokens (`run`) or by document (`document`); None: they are no keys.
    """
    random = np.random.default_rng(seed)
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    if mask is None:
        mask = (random.random(document.size) < mask_rate) & (position > 0) & (mode == "bidirectional")
    next_masked = np.append(mask[1:] & (document[1:] == document[:-1]), False)
    live = mask & next_masked
    token_of_row = np.concatenate([np.flatnonzero(~mask), np.flatnonzero(live)])
    kept_before = np.concatenate([np.cumsum(~mask[document == d]) for d in range(len(lengths))])
    starts_run = mask & ~np.append(False, mask[:-1])
    owner = np.cumsum(starts_run) if spans == "run" else document
    plan = build_plan(
        mode,
        kept_lengths=np.bincount(document[~mask], minlength=len(lengths)),
        live_document=document[live],
        live_split=kept_before[live],
        live_spans=None if spans is None else np.unique(owner[live], return_counts=True)[1],
    )
    tensor = lambda *shape: torch.from_numpy(random.standard_normal(shape))  # noqa: E731
    queries, keys = heads
    cos, sin = rotary_tables(position + position_shift, head_dim, rotary_factor)
    seen = torch.zeros(document.size, 1, 1, dtype=torch.float64)
    seen[torch.from_numpy(token_of_row)] = 1.0
    return Problem(
        q=tensor(document.size, queries, head_dim),
        k=tensor(document.size, keys, head_dim),
        v=tensor(document.size, keys, head_dim),
        cos=cos,
        sin=sin,
        grad_out=tensor(document.size, queries, head_dim) * seen,
        document=torch.from_numpy(document),
        position=torch.from_numpy(position),
        masked=torch.from_numpy(mask),
        span=None if spans is None else torch.from_numpy(np.where(live, owner, -1)),
        plan=plan,
        token_of_row=torch.from_numpy(token_of_row),
    )


def rotary_tables(position, head_dim, factor=1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [N, D] as Hugging Face gives them; `factor` as YaRN's attention scaling."""
    frequency = 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    angle = np.asarray(position)[:, None] * np.concatenate([frequency, frequency])
    return torch.from_numpy(np.cos(angle) * factor), torch.from_numpy(np.sin(angle) * factor)


def relative_errors(
    found: list[Tensor], expected: list[Tensor], *, at_least: list[Tensor] | None = None
) -> list[float]:
    """Largest error of each tensor, relative to its largest entry, or to `at_least` (1 by default) where that is more.

    That of a NaN is infinite: Python's `max` passes over a NaN that does not come first.
    """
    least = at_least or [torch.ones(())] * len(found)
    largest = [
        ((a.double() - b.double()).abs() / b.double().abs().max().clamp_min(size)).max()
        for a, b, size in zip(found, expected, least, strict=True)
    ]
    return [float(error.nan_to_num(math.inf)) for error in largest]
