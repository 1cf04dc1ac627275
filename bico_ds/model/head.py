"""The output head with its loss: the logits of a whole batch never exist.

Under ZeRO-3 a module's weight is there only while that module runs, and every rank must enter every module
equally often. Hence the loss lives in the head module itself: entered once a micro-batch, whatever the rows,
and chunked inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A bf16 sum stalls once a chunk adds less than its rounding: relative error 4e-3 over 16 chunks of 512 rows, 0.17
# over 512 chunks of 16; summed in fp32 2e-3 for both (docs/attention.md).
LOW_PRECISION_CHUNKS = 16


class LossHead(nn.Linear):
    """``lm_head`` that, given targets, returns a summed cross entropy; else it is the plain linear layer."""

    chunk_rows: int

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden [N, E], targets int64 [N] -> fp32 scalar: the sum of N cross entropies; 0 for N = 0."""
        if targets is None:
            return super().forward(hidden)
        return chunked_cross_entropy(hidden, self.weight, targets, chunk_rows=self.chunk_rows)


def swap_head(model: Any, chunk_rows: int) -> None:
    """Change the class of a causal LM's output layer to `LossHead`, in place."""
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear, f"unexpected output layer {head}"
    assert head.bias is None, "a Llama-like head has no bias"
    head.__class__ = LossHead
    head.chunk_rows = chunk_rows


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int) -> Tensor:
    """Sum over rows of the cross entropy of ``hidden @ weight.T`` against ``targets``.

    hidden [N, E] and weight [V, E] of one floating dtype, targets int64 [N]. Softmax and sums in fp32 (fp64
    for fp64). At most ``chunk_rows`` rows of logits exist at a time, about 6 bytes a logit in bf16. Gradients
    are computed in the forward pass, chunk by chunk, so that no logit is computed twice (as Liger Kernel
    does, arXiv 2410.10989). The weight's gradient is summed over up to `LOW_PRECISION_CHUNKS` chunks in the
    weight's dtype, and over more of them in fp32, which takes 6 bytes a weight more in bf16.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_rows, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, wants_grad: bool
    ) -> Tensor:
        wants_hidden = wants_grad and ctx.needs_input_grad[0]
        wants_weight = wants_grad and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        in_low_precision = hidden.shape[0] <= LOW_PRECISION_CHUNKS * chunk_rows
        sum_dtype = weight.dtype if in_low_precision else torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if wants_weight else None
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        # One pair of buffers for all chunks: fresh pages for each cost more than the arithmetic on a CPU.
        shape = (min(chunk_rows, hidden.shape[0]), weight.shape[0])
        logits_buffer, exact_buffer = hidden.new_empty(shape), loss.new_empty(shape)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            x, labels = hidden[rows], targets[rows]
            logits, log_probs = logits_buffer[: len(x)], exact_buffer[: len(x)]
            torch.mm(x, weight.T, out=logits)
            log_probs.copy_(logits)
            torch._log_softmax(log_probs, -1, False, out=log_probs)
            loss -= log_probs.gather(1, labels[:, None]).sum()
            if wants_hidden or wants_weight:
                grad_logits = logits.copy_(_grad_logits(log_probs, labels))
                if grad_hidden is not None:
                    torch.mm(grad_logits, weight, out=grad_hidden[rows])
                if grad_weight is not None:
                    _add_product(grad_weight, grad_logits.T, x)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return (*grads, None, None, None)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, the product in the dtype of its factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _grad_logits(log_probs: Tensor, targets: Tensor) -> Tensor:
    """softmax − one-hot, in the memory of ``log_probs``."""
    probs = log_probs.exp_()
    probs[torch.arange(targets.numel(), device=targets.device), targets] -= 1.0
    return probs
