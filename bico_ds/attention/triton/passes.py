"""`Passes` by Triton kernels: one launch each for what bico_ds/attention/passes.py does by some tens of torch's operations.

In fp32 inside, and without a tensor in fp32 of the size of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bico_ds.attention.inputs import AttentionResults, Gradients
from bico_ds.attention.passes import (
    HIDDEN_COLUMNS,
    HIDDEN_KEY,
    FlashProblem,
    KernelResult,
    Pass,
    PassResults,
)
from bico_ds.attention.triton import pass_ops  # noqa: F401  (defines the ops)
from bico_ds.attention.triton.operands import with_packed_heads

_ops = torch.ops.bico_ds


class TritonPasses:
    """`Passes` by the ops of pass_ops.py."""

    def rotated(self, problem: FlashProblem) -> list[Pass]:
        inputs, rows = problem.inputs, problem.rows
        q, k, v = (with_packed_heads(x) for x in (inputs.q, inputs.k, inputs.v))
        is_in_place = rows.key_rows is None and not problem.widens and v.is_contiguous()
        first = [_pass_rows(problem, x, problem.num_rows) for x in (q, k, v)]
        if is_in_place:
            first[2] = v[: problem.num_rows]
        flipped = len(rows.plan.flip_rows)
        second = [_pass_rows(problem, x, flipped) for x in (q, k, v)] if problem.flips else [None] * 3
        _ops.passes_rotated(
            *(q, k, v, inputs.cos.contiguous(), inputs.sin.contiguous()),
            *(rows.query_rows, rows.key_rows, rows.hidden if problem.widens else None, _places(problem)),
            *(problem.query_hider, HIDDEN_KEY),
            *(first[0], first[1], None if is_in_place else first[2], *second),
        )
        passes = [problem.pass_of(*first, flipped=False)]
        return [*passes, problem.pass_of(*second, flipped=True)] if problem.flips else passes

    def merged(
        self, problem: FlashProblem, found: Iterable[KernelResult], target: AttentionResults | None
    ) -> AttentionResults:
        (out1, lse1), *second = ((out.contiguous(), lse.contiguous()) for out, lse in found)
        out2, lse2 = second[0] if second else (None, None)
        if target is None and problem.widens:
            shape = (problem.num_rows, out1.shape[1], problem.inputs.q.shape[2])
            target = AttentionResults(out=out1.new_empty(shape), lse=torch.empty_like(lse1).t())
        if target is None and not second:
            return AttentionResults(out=out1, lse=lse1.t())
        out, lse = (None, None) if target is None else (target.out, target.lse)
        _ops.passes_merged(out1, lse1, out2, lse2, problem.rows.query_rows, _places(problem), out, lse)
        return target or AttentionResults(out=out1, lse=lse1.t())

    def gathered(
        self, problem: FlashProblem, results: AttentionResults, grad_out: Tensor
    ) -> list[PassResults]:
        rows, count = problem.rows, problem.num_rows
        moves_first = rows.query_rows is not None or problem.widens
        first = _empty_results(problem, results, count) if moves_first else None
        second = _empty_results(problem, results, len(rows.plan.flip_rows)) if problem.flips else None
        if first is not None or second is not None:
            _ops.passes_gathered(
                *(grad_out, results.out, results.lse, rows.query_rows, _places(problem), count),
                *_tensors(first),
                *_tensors(second),
            )
        if first is None:
            out, lse = results.out[:count], results.lse[:count].t()
            first = PassResults(grad_out=grad_out[:count], out=out, lse=lse)
        return [first] if second is None else [first, second]

    def summed(
        self,
        problem: FlashProblem,
        gradients: Iterable[Gradients],
        target: Gradients | None,
        *,
        adds: bool,
    ) -> Gradients:
        inputs = problem.inputs
        first, *others = ([x.contiguous() for x in of_pass] for of_pass in gradients)
        second = others[0] if others else [None] * 3
        if target is None:
            dk, dv = (inputs.k.new_empty(inputs.k.shape) for _ in range(2))
            target = inputs.q.new_empty(inputs.q.shape), dk, dv
        _ops.passes_summed(
            *(*first, *second, inputs.cos.contiguous(), inputs.sin.contiguous()),
            *(problem.rows.query_rows, _places(problem), adds, *target),
        )
        return target


TRITON_PASSES = TritonPasses()


def _places(problem: FlashProblem) -> Tensor | None:
    return problem.rows.plan.flip_places if problem.flips else None


def _pass_rows(problem: FlashProblem, x: Tensor, rows: int) -> Tensor:
    """Uninitialised rows of a pass, perhaps widened, with the heads of x."""
    return x.new_empty(rows, x.shape[1], x.shape[2] + (HIDDEN_COLUMNS if problem.widens else 0))


def _empty_results(problem: FlashProblem, results: AttentionResults, rows: int) -> PassResults:
    """Uninitialised, of this many rows."""
    grad, out = (_pass_rows(problem, results.out, rows) for _ in range(2))
    return PassResults(grad_out=grad, out=out, lse=results.lse.new_empty(results.lse.shape[1], rows))


def _tensors(results: PassResults | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if results is None else (results.grad_out, results.out, results.lse)
