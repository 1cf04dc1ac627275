"""The softmax of the head: from a chunk's logits, each row's loss, and the logits' gradient in their place.

On CUDA one launch of a Triton kernel (`head_kernels.py`), which no buffer in fp32 needs; elsewhere, and where that kernel
is refused, torch's own operations. Both compute in fp32. On the meta device the launch states what it would move.
"""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import torch
from torch import Tensor

from bico_ds.common.traffic import Traffic, report
from bico_ds.native.triton_kernels import triton_missing

logger = logging.getLogger(__name__)

_CROSS_ENTROPY, _GRADIENT = "bico_ds::head_cross_entropy", "bico_ds::head_gradient"
torch.library.define(
    _CROSS_ENTROPY,
    "(Tensor(a!) logits, Tensor labels, Tensor(b!) lse, Tensor(c!) losses, bool gradient) -> ()",
)
torch.library.define(_GRADIENT, "(Tensor(a!) logits, Tensor labels, Tensor lse, int first) -> ()")


class HeadSoftmax(Protocol):
    """What the head asks of a softmax. logits [N, C] are contiguous, labels int64 [N], lse and losses [N] as exact as sums.

    `column_multiple`: of how many columns a part of the vocabulary should have a multiple.
    """

    column_multiple: int

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, lse: Tensor, losses: Tensor, *, gradient: bool
    ) -> None:
        """Write each row's log-sum-exp and cross entropy, and with `gradient` the logits' gradient over the logits.

        Without `gradient` the logits are as they were.
        """

    def write_gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, first: int) -> None:
        """Write the gradient over logits of columns `first` and on of the vocabulary, of whose rows lse is known.

        A label may lie outside of these columns.
        """


class TorchSoftmax:
    """By torch's operations, in a buffer for as many logits as `logits` has elements: fp32, or fp64 for fp64."""

    column_multiple = 1

    def __init__(self, logits: Tensor) -> None:
        self._buffer = logits.new_empty(
            logits.numel(), dtype=torch.promote_types(logits.dtype, torch.float32)
        )

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, lse: Tensor, losses: Tensor, *, gradient: bool
    ) -> None:
        log_probs = self._exact(logits)
        torch._log_softmax(log_probs, -1, False, out=log_probs)
        picked = log_probs.gather(1, labels[:, None])
        torch.neg(picked[:, 0], out=losses)
        torch.sub(logits.gather(1, labels[:, None])[:, 0], picked[:, 0], out=lse)
        if gradient:
            logits.copy_(_less_one_hot(log_probs.exp_(), labels[:, None]))

    def write_gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, first: int) -> None:
        probs = self._exact(logits).sub_(lse[:, None]).exp_()
        logits.copy_(_less_one_hot(probs, labels[:, None] - first))

    def _exact(self, logits: Tensor) -> Tensor:
        return self._buffer[: logits.numel()].view(logits.shape).copy_(logits)


class TritonSoftmax:
    """By one launch each. A label outside of the vocabulary makes its row's loss NaN."""

    # Aligned rows: a thread loads and stores 16 bytes at a time.
    column_multiple = 16

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, lse: Tensor, losses: Tensor, *, gradient: bool
    ) -> None:
        torch.ops.bico_ds.head_cross_entropy(logits, labels, lse, losses, gradient)

    def write_gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, first: int) -> None:
        torch.ops.bico_ds.head_gradient(logits, labels, lse, first)


def head_softmax(logits: Tensor) -> HeadSoftmax:
    """The softmax for as many logits as `logits` has elements, of its dtype, on its device; decided once for these two."""
    if head_softmax_refusal(logits.dtype, logits.device) is None:
        return TritonSoftmax()
    return TorchSoftmax(logits)


@functools.cache
def head_softmax_refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton kernels do not serve such logits, in one clause; None where they do.

    On CUDA they must first give on this GPU what torch gives (`head_softmax_fault`); what they are refused for is logged,
    once. A CPU has them where Triton's interpreter is on (`TRITON_INTERPRET=1`), which is slow and has no bf16: for tests.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        refusal: str | None = f"takes bfloat16, float16 or float32, not {str(dtype).removeprefix('torch.')}"
    else:
        refusal = triton_missing(device)
    if device.type == "cpu" and dtype == torch.bfloat16:
        refusal = refusal or "takes float32 or float16 in Triton's interpreter"
    if device.type == "cuda":
        refusal = refusal or head_softmax_fault(dtype, device)
        if refusal is not None:
            logger.warning("the head's softmax runs by torch's own kernels: ours %s", refusal)
    return refusal


def head_softmax_fault(dtype: torch.dtype, device: torch.device) -> str | None:
    """Where the Triton kernels differ from torch's operations on this device, in one clause; None where they do not.

    A small random problem; the host waits for it. No random state but its own is used.
    """
    try:
        generator = torch.Generator(device).manual_seed(0)
        rows, columns = 5, 20_000
        logits = torch.randn(rows, columns, generator=generator, device=device).mul_(4).to(dtype)
        labels = torch.linspace(0, columns - 1, rows, device=device).long()
        ours, theirs = (
            _answers(softmax, logits, labels) for softmax in (TritonSoftmax(), TorchSoftmax(logits))
        )
    # Whatever keeps Triton from compiling or launching on this machine, training does not need it.
    except Exception as error:
        return f"failed on {device}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    rounding = max(2 * torch.finfo(dtype).eps, 1e-5)
    for name, mine, other in zip(ours, ours.values(), theirs.values(), strict=True):
        if not torch.allclose(mine.float(), other.float(), rtol=rounding, atol=1e-6):
            return f"gives another {name} than torch on {device}"
    return None


def _answers(softmax: HeadSoftmax, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """All that a softmax computes: of whole rows, and of two parts of the vocabulary."""
    gradient = logits.clone()
    lse, losses = (labels.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
    softmax.cross_entropy(gradient, labels, lse, losses, gradient=True)
    middle = logits.shape[1] // 2
    parts = [logits[:, :middle].contiguous(), logits[:, middle:].contiguous()]
    for part, first in zip(parts, (0, middle), strict=True):
        softmax.write_gradient(part, labels, lse, first)
    return {
        "log-sum-exp": lse,
        "loss": losses,
        "gradient": gradient,
        "gradient of a part": torch.cat(parts, 1),
    }


@torch.library.impl(_CROSS_ENTROPY, ("cuda", "cpu"))
def _cross_entropy(logits: Tensor, labels: Tensor, lse: Tensor, losses: Tensor, gradient: bool) -> None:
    from bico_ds.model.head_kernels import cross_entropy_launch

    with torch.cuda.device_of(logits):
        cross_entropy_launch(logits, labels, lse, losses, gradient).run()


@torch.library.impl(_GRADIENT, ("cuda", "cpu"))
def _gradient(logits: Tensor, labels: Tensor, lse: Tensor, first: int) -> None:
    from bico_ds.model.head_kernels import gradient_launch

    with torch.cuda.device_of(logits):
        gradient_launch(logits, labels, lse, first).run()


@torch.library.register_fake(_CROSS_ENTROPY)
def _fake_cross_entropy(logits: Tensor, labels: Tensor, lse: Tensor, losses: Tensor, gradient: bool) -> None:
    written = lse.nbytes + losses.nbytes + (logits.nbytes if gradient else 0)
    read = logits.nbytes + labels.nbytes
    report(Traffic(op="head cross entropy", launches=1, bytes_read=read, bytes_written=written))


@torch.library.register_fake(_GRADIENT)
def _fake_gradient(logits: Tensor, labels: Tensor, lse: Tensor, first: int) -> None:
    read = logits.nbytes + labels.nbytes + lse.nbytes
    report(Traffic(op="head gradient", launches=1, bytes_read=read, bytes_written=logits.nbytes))


def _less_one_hot(probs: Tensor, labels: Tensor) -> Tensor:
    """probs [N, V] less 1 at labels [N, 1] where these lie within, in place."""
    columns = probs.shape[1]
    inside = ((labels >= 0) & (labels < columns)).to(probs.dtype)
    return probs.scatter_add_(1, labels.clamp(0, columns - 1), -inside)
