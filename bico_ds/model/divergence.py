"""KL(start model ‖ model) per row, with its gradient, from hidden states and the head: logits of few rows exist at a time.

Both distributions are over the whole vocabulary V, or without the target token, so that learning it costs nothing
(arXiv 2605.29498). The gradient is computed in the forward pass, as for the cross entropy (`head.py`): with p of the start
model and q of the model, KL = Σ p log(p / q), and for the model's logits z, dKL/dz = q Σp - p.

Shape legend: M rows, E hidden size, V vocabulary, K stored tokens per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bico_ds.batch import TeacherRows
from bico_ds.config.sections.model import LOW_PRECISION_CHUNKS

# Of what the stored tokens of a row leave of 1: less is the rounding of their sum in fp32.
_LEAST_REST = 1e-6


def divergence_from_hidden(
    hidden: Tensor, start_hidden: Tensor, weight: Tensor, *, without: Tensor | None, chunk_rows: int
) -> Tensor:
    """Sum over rows of KL(softmax(start_hidden @ weight.T) ‖ softmax(hidden @ weight.T)), a scalar in at least fp32.

    hidden and start_hidden [M, E], weight [V, E], all of one dtype; without int64 [M]: tokens that are left out, None: none.
    The gradient goes to `hidden` alone: the weight is the start model's own, and is not trained. About 14 bytes per logit of
    `chunk_rows` rows exist at a time in bf16.
    """
    assert not weight.requires_grad, "a head that is trained is not the start model's"
    return _FromHidden.apply(hidden, start_hidden, weight, without, chunk_rows)


def divergence_from_stored(
    hidden: Tensor,
    teacher: TeacherRows,
    weight: Tensor,
    *,
    exclude_target: bool,
    targets: Tensor,
    chunk_rows: int,
) -> Tensor:
    """Sum over rows of KL(teacher ‖ softmax(hidden @ weight.T)), all tokens that are not stored as one bucket.

    hidden [M, E], weight [V, E], targets int64 [M]. It is at most the KL of the whole distributions, and that for K = V.
    With `exclude_target` the target leaves the stored tokens, or else the bucket, and what is left is divided by its sum; a
    row of which nothing is left counts nothing. The gradient goes to hidden and weight. That of the weight is summed in the
    weight's dtype; where that is bf16, a chunk has more than `chunk_rows` rows if there would be more than
    `LOW_PRECISION_CHUNKS` chunks.
    """
    if weight.requires_grad and weight.dtype != _exact(weight):
        chunk_rows = max(chunk_rows, -(-len(hidden) // LOW_PRECISION_CHUNKS))
    return _FromStored.apply(hidden, weight, teacher, targets if exclude_target else None, chunk_rows)


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        start_hidden: Tensor,
        weight: Tensor,
        without: Tensor | None,
        chunk_rows: int,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=_exact(hidden))
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            excluded = None if without is None else without[rows, None]
            log_p = _log_probabilities(start_hidden[rows], weight, excluded)
            log_q = _log_probabilities(hidden[rows], weight, excluded)
            p = log_p.exp()
            log_ratio = log_p.sub_(log_q)
            if excluded is not None:  # the difference of two infinities
                log_ratio.scatter_(1, excluded, 0.0)
            total += log_ratio.mul_(p).sum()
            grad_logits = log_q.exp_().sub_(p)
            torch.mm(grad_logits.to(weight.dtype), weight, out=grad_hidden[rows])
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden.mul_(grad), None, None, None, None


class _FromStored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: TeacherRows,
        without: Tensor | None,
        chunk_rows: int,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=_exact(hidden))
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            excluded = None if without is None else without[rows, None]
            log_q = _log_probabilities(hidden[rows], weight, excluded)
            value, grad_logits = _stored_chunk(log_q, teacher.rows(rows), excluded)
            total += value
            low = grad_logits.to(weight.dtype)
            torch.mm(low, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(low.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if part is None else part.mul_(grad) for part in ctx.saved_tensors)
        return (*grads, None, None, None)


def _stored_chunk(log_q: Tensor, teacher: TeacherRows, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of the divergences of log_q [M, V], and its gradient by the logits [M, V], which takes the memory of log_q.

    With q_rest the model's probability of the bucket, dKL/dz is q Σp - p of a stored token, and
    (q / q_rest) (q_rest Σp - p_rest) of another.
    """
    p, p_rest = _buckets(teacher, excluded, log_q.dtype)
    mass = p.sum(1, keepdim=True) + p_rest
    log_q_stored = log_q.gather(1, teacher.ids)
    log_q_rest = log_q.scatter_(1, teacher.ids, -torch.inf).logsumexp(1, keepdim=True)
    value = _times_log_ratio(p, log_q_stored).sum() + _times_log_ratio(p_rest, log_q_rest).sum()
    # Of an empty bucket there is nothing to divide.
    shares = log_q.sub_(log_q_rest.where(log_q_rest.isfinite(), 0.0)).exp_()
    grad = shares.mul_(mass * log_q_rest.exp() - p_rest)
    return value, grad.scatter_(1, teacher.ids, mass * log_q_stored.exp() - p)


def _buckets(teacher: TeacherRows, excluded: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The start model's probabilities of the stored tokens [M, K] and of all others together [M, 1]; 1 or, of nothing, 0."""
    p = teacher.log_probs.to(dtype).exp()
    rest = 1.0 - p.sum(1, keepdim=True)
    if excluded is not None:
        is_target = teacher.ids == excluded
        target = teacher.target_log_probs.to(dtype).exp()[:, None]
        rest = rest - target.masked_fill(is_target.any(1, keepdim=True), 0.0)
        p = p.masked_fill(is_target, 0.0)
    # Before the division, which would make a probability of a rounding where the target had nearly all.
    rest = rest.where(rest >= _LEAST_REST, 0.0)
    mass = (p.sum(1, keepdim=True) + rest).clamp_min(torch.finfo(dtype).tiny)
    return p / mass, rest / mass


def _times_log_ratio(p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q), which is 0 for p = 0, whatever q."""
    return torch.where(p > 0, torch.special.xlogy(p, p) - p * log_q, 0.0)


def _log_probabilities(hidden: Tensor, weight: Tensor, excluded: Tensor | None) -> Tensor:
    logits = torch.mm(hidden, weight.T).to(_exact(hidden))
    if excluded is not None:
        logits.scatter_(1, excluded, -torch.inf)
    torch._log_softmax(logits, -1, False, out=logits)
    return logits


def _exact(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
