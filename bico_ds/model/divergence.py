"""KL(base ‖ model) per row, with its gradient, from hidden states and the head: logits of few rows exist at a time.

Both distributions are over the whole vocabulary V, or without the target token, so that learning it costs nothing
(2605.29498). The gradient is computed in the forward pass, as for the cross entropy (`head.py`): for logits z of the model,
dKL/dz = q - p.

Shape legend: M rows, E hidden size, V vocabulary, K stored tokens per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bico_ds.batch import TeacherRows
from bico_ds.config.schema import LOW_PRECISION_CHUNKS

# Of a stored distribution's rest: less is its rounding.
_LEAST_REST = 1e-6


def divergence_from_hidden(
    hidden: Tensor, base_hidden: Tensor, weight: Tensor, *, without: Tensor | None, chunk_rows: int
) -> Tensor:
    """Sum over rows of KL(softmax(base_hidden @ weight.T) ‖ softmax(hidden @ weight.T)), a scalar in at least fp32.

    hidden and base_hidden [M, E], weight [V, E], all of one dtype; without int64 [M]: tokens that are left out, None: none.
    The gradient goes to `hidden` alone: the weight is the base's own, and is not trained.
    """
    assert not weight.requires_grad, "a head that is trained is not the base's"
    return _FromHidden.apply(hidden, base_hidden, weight, without, chunk_rows)


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
    With `exclude_target` the target leaves the stored tokens, or else the bucket, and what is left is renormalised. The
    gradient goes to hidden and weight; that of the weight is summed in its dtype, over few chunks.
    """
    chunk_rows = max(chunk_rows, -(-len(hidden) // LOW_PRECISION_CHUNKS))
    return _FromStored.apply(hidden, weight, teacher, targets if exclude_target else None, chunk_rows)


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, base_hidden: Tensor, weight: Tensor, without: Tensor | None, chunk_rows: int
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=_exact(hidden))
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            excluded = None if without is None else without[rows, None]
            log_q = _log_probabilities(hidden[rows], weight, excluded)
            log_p = _log_probabilities(base_hidden[rows], weight, excluded)
            p, q = log_p.exp(), log_q.exp()
            if excluded is not None:  # there both are zero, and their logarithms are not numbers to subtract
                log_p.scatter_(1, excluded, 0.0)
                log_q.scatter_(1, excluded, 0.0)
            total += (p * (log_p - log_q)).sum()
            torch.mm((q - p).to(weight.dtype), weight, out=grad_hidden[rows])
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
    """The sum of the divergences of log_q [M, V], and its gradient by the logits [M, V].

    With q_rest the model's probability of all tokens that are not stored, dKL/dz is q - p of a stored token, and
    q (1 - p_rest / q_rest) of another.
    """
    p = teacher.log_probs.to(log_q.dtype).exp()
    rest = 1.0 - p.sum(1, keepdim=True)
    stored = torch.ones_like(p, dtype=torch.bool)
    if excluded is not None:
        target = teacher.target_log_probs.to(log_q.dtype).exp()[:, None]
        stored = teacher.ids != excluded
        rest = rest - torch.where(stored.all(1, keepdim=True), target, 0.0)
        scale = 1.0 / (1.0 - target).clamp_min(torch.finfo(log_q.dtype).eps)
        p, rest = torch.where(stored, p * scale, 0.0), rest * scale
    rest = torch.where(rest < _LEAST_REST, 0.0, rest)
    log_q_stored = log_q.gather(1, teacher.ids)
    log_q_rest = log_q.scatter(1, teacher.ids, -torch.inf).logsumexp(1, keepdim=True)
    log_q_rest = torch.where(rest > 0, log_q_rest, 0.0)
    log_p = torch.where(p > 0, p, 1.0).log()
    value = torch.where(stored, p * (log_p - log_q_stored), 0.0).sum()
    value = value + torch.where(rest > 0, rest * (rest.clamp_min(_LEAST_REST).log() - log_q_rest), 0.0).sum()
    q = log_q.exp()
    kept = 1.0 - torch.where(rest > 0, rest * torch.exp(-log_q_rest), 0.0)
    grad = q * kept
    grad.scatter_(1, teacher.ids, torch.where(stored, log_q_stored.exp() - p, 0.0))
    return value, grad


def _log_probabilities(hidden: Tensor, weight: Tensor, excluded: Tensor | None) -> Tensor:
    logits = torch.mm(hidden, weight.T).to(_exact(hidden))
    if excluded is not None:
        logits.scatter_(1, excluded, -torch.inf)
    return torch.log_softmax(logits, -1)


def _exact(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
