"""Bidirectional attention as two plain causal flash passes, merged by log-sum-exp.

Pass 1: causal over forward-rotated q and k (keys up to the query, diagonal included). Pass 2: the strictly
anti-causal part over reverse-rotated q and k, as a causal pass over flipped rows. Backward hands each kernel
the *merged* out and lse (as ring attention does, arXiv 2310.01889): `exp(s - lse)` is then the weight
within the one softmax.
"""

from __future__ import annotations

from torch import Tensor

from bico_ds.attention.inputs import AttentionResults, Gradients
from bico_ds.attention.kernels.base import CausalKernel
from bico_ds.attention.passes import FlashProblem, Passes


def two_pass_forward(
    kernel: CausalKernel, passes: Passes, problem: FlashProblem, target: AttentionResults | None = None
) -> AttentionResults:
    """out and lse of the problem's rows: written to those of `target`, or returned alone (`Passes.merged`)."""
    found = (kernel.forward(p.q, p.k, p.v, **p.settings) for p in passes.rotated(problem))
    return passes.merged(problem, found, target)


def two_pass_backward(
    kernel: CausalKernel,
    passes: Passes,
    problem: FlashProblem,
    results: AttentionResults,
    grad_out: Tensor,
    target: Gradients | None = None,
    *,
    adds: bool = False,
) -> Gradients:
    """Gradients of the problem's raw q, k, v: written or added to its rows of `target`, or returned (`Passes.summed`).

    `results`: the batch's merged ones; grad_out [T, H, D].
    """
    gradients = (
        kernel.backward(known.grad_out, p.q, p.k, p.v, known.out, known.lse, **p.settings)
        for p, known in zip(passes.rotated(problem), passes.gathered(problem, results, grad_out), strict=True)
    )
    return passes.summed(problem, gradients, target, adds=adds)
