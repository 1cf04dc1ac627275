"""What surrounds the two flash passes: rotated inputs for them, the merge, and in the backward pass gradients rotated back.

Here by torch's operations; by Triton kernels, in one read of q and k for both passes, in bico_ds/attention/triton/passes.py.

Live placeholders may be rows of the same problem: queries whose own keys are *hidden*. Most kernels know no
key mask; for them the head dimension grows by 8 columns that add -4000 to the score of a hidden key. The
first row of a document is never hidden, so pass 1 always has a visible key; a pass-2 row that sees hidden
keys only has an lse near -4000, which the merge wipes out.

Shape legend: T rows of the batch, N rows of the problem, M flipped rows, H query heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NotRequired, Protocol, TypeAlias, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from bico_ds.attention.inputs import AttentionInputs, AttentionResults, Gradients
from bico_ds.attention.kernels.base import HIDDEN_SCORE
from bico_ds.attention.layout import FlashRows
from bico_ds.attention.rotation import rotate_back, rotate_forward
from bico_ds.named_parts import as_step_part

HIDDEN_COLUMNS = 8
HIDDEN_KEY = -30000.0  # within fp16's range

KernelResult: TypeAlias = tuple[Tensor, Tensor]  # of one pass: out [N, H, D or wider], lse [H, N]


@dataclass(frozen=True, kw_only=True)
class FlashProblem:
    """The `rows` of a batch whose `inputs` these are: its kept rows, or documents of a `FlashRows` table.

    `widens`: hidden keys are hidden by more columns, because the kernel knows no key mask.
    """

    inputs: AttentionInputs
    rows: FlashRows
    widens: bool

    @property
    def num_rows(self) -> int:
        """N."""
        return self.rows.plan.num_kept

    @property
    def flips(self) -> bool:
        """Whether there is a second pass."""
        return self.rows.plan.flip_max_seqlen > 0

    @property
    def query_hider(self) -> float:
        """What a query's last column holds, so that its product with `HIDDEN_KEY` is the score of a hidden key."""
        return HIDDEN_SCORE / (HIDDEN_KEY * self.inputs.scale)

    def read(self, x: Tensor) -> Tensor:
        """The problem's rows of x [T, …], by the rows of queries."""
        return _read(x, self.rows.query_rows, self.num_rows)

    def read_keys(self, x: Tensor) -> Tensor:
        return _read(x, self.rows.key_rows, self.num_rows)

    def pass_of(self, q: Tensor, k: Tensor, v: Tensor, *, flipped: bool) -> Pass:
        """The first pass over such inputs, or the second one, of flipped rows."""
        plan, hidden = self.rows.plan, None if self.widens else self.rows.hidden
        if flipped and hidden is not None:
            hidden = hidden[plan.flip_key_rows]
        return Pass(
            q=q,
            k=k,
            v=v,
            cu_seqlens=plan.flip_cu_seqlens if flipped else plan.cu_seqlens,
            max_seqlen=plan.flip_max_seqlen if flipped else plan.max_seqlen,
            scale=self.inputs.scale,
            hidden=hidden,
        )


class _Settings(TypedDict):
    """What a kernel takes by keyword."""

    cu_seqlens: Tensor
    max_seqlen: int
    scale: float
    hidden: NotRequired[Tensor]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Inputs of one kernel call: q, k, v, rotated and, with hidden keys, perhaps widened."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    scale: float
    hidden: Tensor | None

    @property
    def settings(self) -> _Settings:
        """`hidden` only where there are hidden keys."""
        packing = _Settings(cu_seqlens=self.cu_seqlens, max_seqlen=self.max_seqlen, scale=self.scale)
        return packing if self.hidden is None else {**packing, "hidden": self.hidden}


@dataclass(frozen=True, kw_only=True)
class PassResults:
    """What a kernel's backward takes beside its inputs: the *merged* out and lse [H, N], and out's gradient."""

    grad_out: Tensor
    out: Tensor
    lse: Tensor


class Passes(Protocol):
    """What a two-pass attention does around its kernel. Targets have all rows of the batch, perhaps one more."""

    def rotated(self, problem: FlashProblem) -> Iterable[Pass]:
        """The inputs of the first pass and, where there is one, of the second."""
        ...

    def merged(
        self, problem: FlashProblem, found: Iterable[KernelResult], target: AttentionResults | None
    ) -> AttentionResults:
        """One softmax from the passes': written to the problem's rows of `target`; None: returned, [N, H, D] and [N, H]."""
        ...

    def gathered(
        self, problem: FlashProblem, results: AttentionResults, grad_out: Tensor
    ) -> Iterable[PassResults]:
        """For each pass, the rows of the batch's merged results and of out's gradient [T, H, D]."""
        ...

    def summed(
        self,
        problem: FlashProblem,
        gradients: Iterable[Gradients],
        target: Gradients | None,
        *,
        adds: bool,
    ) -> Gradients:
        """Gradients of raw q, k, v from those of each pass's inputs, summed in at least fp32.

        Written to the problem's rows of `target`; with `adds` those of k and v are added to what is there. None: returned,
        in the inputs' dtype.
        """
        ...


class TorchPasses:
    """`Passes` by torch's operations."""

    def rotated(self, problem: FlashProblem) -> Iterator[Pass]:
        inputs = problem.inputs
        q, k, v = problem.read(inputs.q), problem.read_keys(inputs.k), problem.read_keys(inputs.v)
        tables = _tables(problem)
        hidden = problem.rows.hidden if problem.widens else None
        first = rotate_forward(q, *tables), rotate_forward(k, *tables), v.contiguous()
        yield problem.pass_of(*_widened(first, hidden, problem.query_hider), flipped=False)
        del first
        if not problem.flips:
            return
        queries, keys = problem.rows.plan.flip_rows, problem.rows.plan.flip_key_rows
        second = (
            rotate_forward(q.index_select(0, queries), *_reversed(tables, queries)),
            rotate_forward(k.index_select(0, keys), *_reversed(tables, keys)),
            v.index_select(0, keys),
        )
        hidden = None if hidden is None else hidden[keys]
        yield problem.pass_of(*_widened(second, hidden, problem.query_hider), flipped=True)

    def merged(
        self, problem: FlashProblem, found: Iterable[KernelResult], target: AttentionResults | None
    ) -> AttentionResults:
        D = problem.inputs.q.shape[-1]
        (out, lse), *second = found
        results = AttentionResults(out=out[..., :D], lse=lse.t())
        for out2, lse2 in second:
            results = replace(results, out=results.out.contiguous())
            other = AttentionResults(out=out2[..., :D], lse=lse2.t())
            merge(results, other, problem.rows.plan.flip_rows)
        if target is None:
            return results
        for whole, part in ((target.out, results.out), (target.lse, results.lse)):
            _write(whole, problem, part)
        return target

    def gathered(
        self, problem: FlashProblem, results: AttentionResults, grad_out: Tensor
    ) -> Iterator[PassResults]:
        extra = HIDDEN_COLUMNS if problem.widens else 0
        rows = [problem.read(x) for x in (grad_out, results.out, results.lse)]
        yield _pass_results(rows, extra)
        if problem.flips:
            yield _pass_results([x.index_select(0, problem.rows.plan.flip_rows) for x in rows], extra)

    def summed(
        self,
        problem: FlashProblem,
        gradients: Iterable[Gradients],
        target: Gradients | None,
        *,
        adds: bool,
    ) -> Gradients:
        inputs, plan, tables = problem.inputs, problem.rows.plan, _tables(problem)
        remaining = iter(gradients)
        dq, dk, dv = _rotated_back(next(remaining), tables, tables)
        for second in remaining:
            queries, keys = plan.flip_rows, plan.flip_key_rows
            parts = _rotated_back(second, _reversed(tables, queries), _reversed(tables, keys))
            for whole, rows, part in zip((dq, dk, dv), (queries, keys, keys), parts, strict=True):
                whole.index_add_(0, rows, part)
        if target is None:
            return dq.to(inputs.q.dtype), dk.to(inputs.k.dtype), dv.to(inputs.v.dtype)
        for whole, part, add in zip(target, (dq, dk, dv), (False, adds, adds), strict=True):
            _write(whole, problem, part + problem.read(whole) if add else part)
        return target


TORCH_PASSES = TorchPasses()


@as_step_part("attention merge")
def merge(base: AttentionResults, other: AttentionResults, rows: Tensor) -> None:
    """One softmax from two: `base` of N rows, updated in place at `rows` [M] by `other` of M rows.

    Computed in lse's dtype. Written with differences of lse, so that the farthest two neither overflow nor lose the base.
    """
    lse, lse2 = base.lse.t(), other.lse.t()  # [H, N] and [H, M], as kernels give them
    base_out, base_lse = base.out.index_select(0, rows).to(lse.dtype), lse.index_select(1, rows)
    difference = base_lse - lse2
    share = torch.sigmoid(-difference).t().unsqueeze(-1)
    merged = torch.addcmul(base_out, share, other.out - base_out)
    base.out.index_copy_(0, rows, merged.to(base.out.dtype))
    lse.index_copy_(1, rows, base_lse - logsigmoid(difference))


def _tables(problem: FlashProblem) -> tuple[Tensor, Tensor]:
    """cos and sin [N, 1, D] of the problem's rows."""
    return problem.read(problem.inputs.cos)[:, None], problem.read(problem.inputs.sin)[:, None]


def _reversed(tables: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the reversed rotation at the rows."""
    cos, sin = tables
    return cos.index_select(0, rows), sin.index_select(0, rows).neg()


def _widened(
    inputs: tuple[Tensor, Tensor, Tensor], hidden: Tensor | None, query_hider: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With `hidden`, q, k and v with 8 more columns: the product of q and k is -4000 for hidden keys and 0 for others."""
    if hidden is None:
        return inputs
    q, k, v = (pad(x, (0, HIDDEN_COLUMNS)) for x in inputs)
    q[..., -1] = query_hider
    k[..., -1] = hidden[:, None] * HIDDEN_KEY
    return q, k, v


def _pass_results(rows: list[Tensor], extra: int) -> PassResults:
    grad_out, out, lse = rows
    if extra:
        grad_out, out = (pad(x, (0, extra)) for x in (grad_out, out))
    return PassResults(grad_out=grad_out, out=out, lse=lse.t())


def _rotated_back(
    gradients: Gradients, query_tables: tuple[Tensor, Tensor], key_tables: tuple[Tensor, Tensor]
) -> Gradients:
    """Gradients of one pass's raw q, k, v, in at least fp32."""
    D = query_tables[0].shape[-1]
    dq, dk, dv = (x[..., :D].to(torch.promote_types(x.dtype, torch.float32)) for x in gradients)
    return rotate_back([dq], *query_tables), rotate_back([dk], *key_tables), dv.contiguous()


def _read(x: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """The given rows; without a table the first ones, where they are."""
    return x[:num_rows] if rows is None else x.index_select(0, rows)


def _write(target: Tensor, problem: FlashProblem, x: Tensor) -> None:
    if problem.rows.query_rows is None:
        target[: problem.num_rows] = x
    else:
        target.index_copy_(0, problem.rows.query_rows, x.to(target.dtype))
