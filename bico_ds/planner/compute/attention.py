"""The ways to compute attention: their matrix products, and which (query, key) pairs they visit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from bico_ds.config.sections.model import ModelSpec
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.planner.workload import MicroBatch

# `span_flash_from` of CUDA_POLICY in bico_ds/attention/layout.py: rows of the spans that a flash kernel serves.
SPAN_FLASH_FROM = 128


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A way to compute attention: its matrix products per (query, key) pair that it visits, forward and backward."""

    name: str
    forward: int
    backward: int


# Flash kernels (arXiv 2205.14135, algorithms 1 and 4; bico_ds/native/tiles.cpp): scores and mixed values; backward the
# scores again, and the gradients of weights, values, queries and keys. A pair has one rotation, so it is visited once.
FLASH = Kernel(name="flash", forward=2, backward=5)
# bico_ds/attention/triton/backward.py: a kernel per block of queries (scores, gradients of weights and queries), another
# per block of keys (scores, gradients of weights, values and keys).
TRITON = Kernel(name="triton", forward=2, backward=7)
# bico_ds/attention/dense.py: scores by both rotations for every pair, and their gradients for queries and keys.
DENSE_CAUSAL = Kernel(name="causal tiles", forward=2, backward=5)
DENSE_BIDIRECTIONAL = Kernel(name="tiles", forward=3, backward=8)
# bico_ds/attention/oracle.py: both rotations in either mode; autograd keeps the weights.
ORACLE = Kernel(name="oracle", forward=3, backward=6)


@dataclass(frozen=True, kw_only=True)
class Visits:
    """(query, key) pairs that a kernel computes scores of, per query head and layer, visible or not."""

    kernel: Kernel
    pairs: float


def expected_visits(model: ModelSpec, batch: MicroBatch, *, on_cuda: bool) -> tuple[Visits, ...]:
    """What the kernels of `model.attention_backend` visit in a layer (attention/backends.py and layout.py).

    On a GPU `auto` is a flash kernel for bf16, with the Triton kernels for live rows (dense tiles, where a flash kernel is
    named), and tiles alone for fp32; on a CPU the fused kernel. Not counted: invisible pairs of the blocks at the diagonal,
    padding of tiles, hidden keys; so these are a lower bound. Tiles visit the whole square of a causal document. The shares
    of kept and live queries in the pairs with kept keys are taken to be those of the rows: with rates drawn per document
    from [0, 1] that counts twice as many live pairs as there are.
    """
    if model.attention_backend == "oracle":
        return (Visits(kernel=ORACLE, pairs=batch.rows**2),)
    if not on_cuda:
        return (Visits(kernel=FLASH, pairs=batch.pairs),)
    if model.attention_backend == "triton":
        return (Visits(kernel=TRITON, pairs=batch.pairs),)
    if model.dtype == "fp32" and batch.mode == "causal":
        return (Visits(kernel=DENSE_CAUSAL, pairs=_square(batch.pairs, batch.rows)),)
    over_kept = batch.pairs - batch.span_pairs
    if model.dtype == "fp32":
        pairs = {DENSE_BIDIRECTIONAL: over_kept}
    else:
        live = over_kept * batch.live_rows / batch.rows
        of_live = TRITON if model.attention_backend == "auto" else DENSE_BIDIRECTIONAL
        pairs = {FLASH: over_kept - live, of_live: live}
    if batch.span_pairs:
        kernel = span_kernel(model, batch)
        visited = _square(batch.span_pairs, batch.live_rows) if kernel is DENSE_CAUSAL else batch.span_pairs
        pairs[kernel] = pairs.get(kernel, 0.0) + visited
    return tuple(Visits(kernel=kernel, pairs=visited) for kernel, visited in pairs.items() if visited)


def part_of(kernel: Kernel, kernels: Collection[Kernel], *, on_cuda: bool) -> StepPart:
    """The part of a step in which one of the `kernels` of a layer runs: beside flash passes the others serve live rows."""
    if kernel in (FLASH, ORACLE) and on_cuda:
        return StepPart.ATTENTION_PASSES
    return StepPart.LIVE_ROWS if FLASH in kernels and on_cuda else StepPart.ATTENTION_FUSED


def span_kernel(model: ModelSpec, batch: MicroBatch) -> Kernel:
    """What serves the spans of live rows on a GPU (`SpanRows` of attention/layout.py); all are taken to be equally long."""
    if model.attention_backend == "triton":
        return TRITON
    if model.dtype == "fp32":
        return DENSE_CAUSAL
    if batch.mean_span >= SPAN_FLASH_FROM:
        return FLASH
    return TRITON if model.attention_backend == "auto" else DENSE_CAUSAL


def _square(pairs: float, rows: float) -> float:
    """All pairs of causal documents of so many rows: of n (n + 1) / 2 each, n²."""
    return 2 * pairs - rows
