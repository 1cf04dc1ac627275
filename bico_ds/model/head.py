"""The output head with its loss: the logits of all rows of a batch never exist at once.

Under ZeRO-3 a module's weight exists only while that module runs, and every rank must enter every module equally often.
So the loss is computed in the head module: it is entered once per micro-batch, however many rows there are, and works
through them in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from bico_ds.batch import TeacherRows
from bico_ds.config.sections.model import LOW_PRECISION_CHUNKS
from bico_ds.model.divergence import divergence_from_hidden, divergence_from_stored
from bico_ds.model.head_softmax import HeadSoftmax, head_softmax


class Losses(NamedTuple):
    """What a micro-batch of N targets gives.

    `loss`: the sum of N cross entropies, each times its weight where they have weights, and `divergence` that of the
    compared rows' KL(start model ‖ model); scalars in at least fp32, with a gradient; 0 where there are no rows.
    `row_losses` [N]: each cross entropy, without weight or gradient.
    """

    loss: Tensor
    divergence: Tensor
    row_losses: Tensor


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What M of the N rows are compared with: hidden states of the start model [M, E], or its stored distributions.

    `index` int64 [M] counts in the N rows. `exclude_target`: their targets are left out of both distributions.
    """

    index: Tensor
    start_model: Tensor | TeacherRows
    exclude_target: bool


class LossHead(nn.Linear):
    """An `lm_head` that, given targets, returns `Losses`; without them it is the plain linear layer."""

    chunk_rows: int

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        comparison: Comparison | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor | Losses:
        """hidden [N, E], targets int64 [N], loss_weights fp32 [N]; None: all are 1."""
        if targets is None:
            return super().forward(hidden)
        loss, row_losses = chunked_cross_entropy(
            hidden, self.weight, targets, chunk_rows=self.chunk_rows, loss_weights=loss_weights
        )
        if comparison is None:
            return Losses(loss, loss.new_zeros(()), row_losses)
        return Losses(loss, self._divergence(hidden, targets, comparison), row_losses)

    def _divergence(self, hidden: Tensor, targets: Tensor, comparison: Comparison) -> Tensor:
        rows, compared = hidden.index_select(0, comparison.index), targets.index_select(0, comparison.index)
        if isinstance(comparison.start_model, TeacherRows):
            return divergence_from_stored(
                rows,
                comparison.start_model,
                self.weight,
                exclude_target=comparison.exclude_target,
                targets=compared,
                chunk_rows=self.chunk_rows,
            )
        return divergence_from_hidden(
            rows,
            comparison.start_model,
            self.weight,
            without=compared if comparison.exclude_target else None,
            chunk_rows=self.chunk_rows,
        )


def swap_head(model: PreTrainedModel, chunk_rows: int) -> None:
    """Change the class of a causal LM's output layer to `LossHead`, in place."""
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear, f"unexpected output layer {head}"
    assert head.bias is None, "the head of every family in families.py has no bias"
    head.__class__ = LossHead
    head.chunk_rows = chunk_rows


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int, loss_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over rows of the cross entropy of `hidden @ weight.T` against `targets`, and each row's own, without gradient.

    hidden [N, E] and weight [V, E] of one floating dtype, targets int64 [N]. In the sum, and so in the gradients, each row
    counts times its `loss_weights`, fp32 [N]; None: once. Softmax and sums in fp32 (fp64
    for fp64). At most `chunk_rows` rows of logits exist at a time: in bf16 2 bytes per logit where their softmax is
    one launch (CUDA), elsewhere about 6 (`head_softmax.py`). Gradients are computed in the forward pass, chunk by
    chunk, so that no logit is computed twice (as Liger Kernel does, arXiv 2410.10989); the backward pass scales them
    in place, once. The weight's gradient is summed over chunks in the weight's dtype. Where that is bf16 and the
    chunks are more than `LOW_PRECISION_CHUNKS`, it is computed for a block of the vocabulary at a time from all rows
    instead: in the same memory, with the logits computed a second time, and on a CPU for 1.4 to 1.5 times the time
    (docs/benchmarks/step.md).
    """
    return _ChunkedCrossEntropy.apply(
        hidden, weight, targets, loss_weights, chunk_rows, torch.is_grad_enabled()
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor | None,
        chunk_rows: int,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden = wants_grad and ctx.needs_input_grad[0]
        wants_weight = wants_grad and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if loss_weights is not None:
            # Or fp64's gradients would be scaled in fp32: a scalar's dtype does not count.
            loss_weights = loss_weights.to(loss.dtype)
        sums_stall = weight.dtype != loss.dtype and hidden.shape[0] > LOW_PRECISION_CHUNKS * chunk_rows
        lse, row_losses = loss.new_empty(hidden.shape[0]), loss.new_empty(hidden.shape[0])
        # One buffer for all chunks: fresh pages for each cost more than the arithmetic on a CPU.
        buffer = hidden.new_empty(max(min(chunk_rows, len(hidden)) * len(weight), len(hidden)))
        softmax = head_softmax(buffer)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            x = hidden[rows]
            logits = torch.mm(x, weight.T, out=_matrix(buffer, len(x), len(weight)))
            wants = wants_hidden or wants_weight
            softmax.cross_entropy(logits, targets[rows], lse[rows], row_losses[rows], gradient=wants)
            loss += _weighted(row_losses[rows], loss_weights, rows).sum()
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None and not sums_stall:
                grad_weight.addmm_(logits.T, _weighted(x, loss_weights, rows))
        if grad_weight is not None and sums_stall:
            weighted = _weighted(hidden, loss_weights, slice(None))
            _fill_by_vocabulary(grad_weight, hidden, weighted, weight, targets, lse, buffer, softmax)
        ctx.save_for_backward(grad_hidden, grad_weight, loss_weights)
        ctx.mark_non_differentiable(row_losses)
        return loss, row_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, loss_weights = ctx.saved_tensors
        # In one product, so that a row's gradient is rounded once.
        by_row = grad_loss if loss_weights is None else grad_loss * loss_weights[:, None]
        return (
            None if grad_hidden is None else grad_hidden.mul_(by_row),
            None if grad_weight is None else grad_weight.mul_(grad_loss),
            *[None] * 4,
        )


def _weighted(values: Tensor, loss_weights: Tensor | None, rows: slice) -> Tensor:
    """values [M] or [M, E] of these M rows, each times its weight, in the dtype of `values`."""
    if loss_weights is None:
        return values
    weights = loss_weights[rows]
    return (values * (weights if values.dim() == 1 else weights[:, None])).to(values.dtype)


def _matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _fill_by_vocabulary(
    grad_weight: Tensor,
    hidden: Tensor,
    weighted: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    buffer: Tensor,
    softmax: HeadSoftmax,
) -> None:
    """Fill `grad_weight` [V, E] from all rows at once, for as many words of the vocabulary as the buffer holds logits of.

    lse [N], in the loss's dtype; weighted [N, E]: `hidden`, each row times the weight of its loss.
    """
    size = buffer.numel() // len(hidden)
    size = max(1, size - size % softmax.column_multiple)
    for start in range(0, len(weight), size):
        block = weight[start : start + size]
        logits = torch.mm(hidden, block.T, out=_matrix(buffer, len(hidden), len(block)))
        softmax.write_gradient(logits, targets, lse, start)
        torch.mm(logits.T, weighted, out=grad_weight[start : start + size])
