"""What a training step reads and writes beside its matrix products: elementwise work, which memory bounds.

Each operation is counted as reading every input and writing every output once, as the kernels of eager PyTorch do; what
is small beside the rows (tables, lse, masks, biases' gradients) is left out. `tests/planner/test_elementwise.py` compares
with the operations of real steps.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TypeAlias

from bico_ds.config.optimizers import ADAMW
from bico_ds.config.sections.model import ModelSpec
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.compute.attention import (
    DENSE_BIDIRECTIONAL,
    DENSE_CAUSAL,
    FLASH,
    TRITON,
    Kernel,
    expected_visits,
    part_of,
    span_kernel,
)
from bico_ds.planner.deployment import ELEMENT_BYTES
from bico_ds.planner.flops import head_repeats_logits, recomputed_layers
from bico_ds.planner.report.step_parts import StepPart
from bico_ds.planner.workload import MicroBatch

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Reads and writes of each element: in the model's dtype and in fp32. `casts`: from one to the other, both counted.

    A model in fp32 has no casts.
    """

    own: float = 0
    wide: float = 0
    casts: float = 0

    def bytes(self, model: ModelSpec) -> float:
        size = ELEMENT_BYTES[model.dtype]
        return self.own * size + self.wide * _FP32 + (self.casts * (size + _FP32) if size < _FP32 else 0)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something that a layer does to its rows."""

    forward: Passes
    backward: Passes = Passes()


# Operations, each with the part of a step that it belongs to, and the number of its elements.
Work: TypeAlias = list[tuple[StepPart, Operation, float]]

# Passes over memory of one kernel each: `bico_ds/native` on a CPU, liger-kernel on CUDA (model/elementwise_kernels.py).
# RMSNorm; on CUDA its backward pass zeroes what it then writes. With the residual: the sum is read apart and written on a
# CPU, forward and backward, and goes with the norm on CUDA.
NORM = Operation(forward=Passes(own=2), backward=Passes(own=4))
CPU_NORM = Operation(forward=Passes(own=2), backward=Passes(own=3))
ADD_NORM = Operation(forward=Passes(own=4), backward=Passes(own=4))
CPU_ADD_NORM = Operation(forward=Passes(own=5), backward=Passes(own=6))
# On CUDA per element of a norm's weight and program: parts of its gradient, and their sum.
NORM_GRADIENT = Operation(forward=Passes(), backward=Passes(wide=2))
NORM_PROGRAMS = 132
GATE = Operation(forward=Passes(own=3), backward=Passes(own=5))
# Backward the sums of gradients where a norm's output is used twice or three times.
SHARED_ROWS = Operation(forward=Passes(), backward=Passes(own=9))
# Of what an adapter adds: the product with its scale, and the sum.
ADAPTER_OUT = Operation(forward=Passes(own=5), backward=Passes(own=2))
# Of what it reads: the sum of two gradients. Dropout: in and out, and a mask of one byte.
ADAPTER_IN = Operation(forward=Passes(), backward=Passes(own=3))
DROPOUT = Operation(forward=Passes(own=2.5), backward=Passes(own=2.5))

# Around the flash passes (attention/triton/passes.py): q and k rotated, in the backward pass again; gradients of both passes
# rotated back and summed. With a second pass q, k and v are read once for both, v is flipped; out is merged; out and its
# gradient are gathered for the backward pass.
ROTATION = Operation(forward=Passes(own=2), backward=Passes(own=2))
PASS_GRADIENTS = Operation(forward=Passes(), backward=Passes(own=2))
BOTH_ROTATIONS = Operation(forward=Passes(own=3), backward=Passes(own=3))
FLIPPED_VALUES = Operation(forward=Passes(own=2), backward=Passes(own=2))
MERGED_QUERIES = Operation(forward=Passes(own=3), backward=Passes(own=4))
BOTH_GRADIENTS = Operation(forward=Passes(), backward=Passes(own=3))
# The Triton kernels (attention/triton/traffic.py), of live rows beside the flash kernel, or of all: keys are rotated both
# ways, and read by blocks of queries and of keys.
TRITON_QUERIES = Operation(forward=Passes(own=2), backward=Passes(own=9))
TRITON_KEYS = Operation(forward=Passes(own=6), backward=Passes(own=11))
# Beside the flash kernel gradients of keys and values are zeroed, and added to once more; with tiles in fp32, then cast.
ADDED_KEYS = Operation(forward=Passes(), backward=Passes(own=6))
TILED_KEYS = Operation(forward=Passes(), backward=Passes(wide=4, casts=2))
# Dense tiles (attention/dense.py), per score of a head: both rotations blended, softmax, cast; backward the weights again,
# the softmax's gradient, and a product per rotation. Then per row: gathered, rotated, results put back.
SCORE = Operation(forward=Passes(own=6, wide=9, casts=1), backward=Passes(own=10, wide=8, casts=3))
CAUSAL_SCORE = Operation(forward=Passes(own=3, wide=9, casts=1), backward=Passes(own=5, wide=8, casts=3))
# Of a softmax that has more keys: the product of out and its gradient is made, and subtracted from each score's.
PART_QUERIES = Operation(forward=Passes(), backward=Passes(own=2, wide=4, casts=2))
PART_SCORE = Operation(forward=Passes(), backward=Passes(wide=2))
TILE_QUERIES = Operation(forward=Passes(own=17), backward=Passes(own=32))
TILE_KEYS = Operation(forward=Passes(own=17), backward=Passes(own=34, wide=12))
# Spans of live rows (attention/backend.py): rows are gathered, results merged in fp32 (`merge` of attention/passes.py);
# backward they are gathered with out and its gradient, and gradients are added to the batch's.
SPAN_QUERIES = Operation(forward=Passes(own=7, wide=5, casts=2), backward=Passes(own=9))
SPAN_KEYS = Operation(forward=Passes(own=2), backward=Passes(own=5))
# One kernel for all rows (native/tiles.cpp): inputs read once, results written once, dk and dv in fp32.
FUSED_QUERIES = Operation(forward=Passes(own=2), backward=Passes(own=4))
FUSED_KEYS = Operation(forward=Passes(own=2), backward=Passes(own=2, wide=6, casts=2))

# The head (model/head_softmax.py), per logit: its gradient in its place; on a CPU to fp32, log_softmax, exp, back. Per
# element of its weight: zeroed and scaled.
LOGITS = Operation(forward=Passes(own=2))
CPU_LOGITS = Operation(forward=Passes(own=2, wide=6))
HEAD_GRADIENT = Operation(forward=Passes(own=1), backward=Passes(own=2))
# model/divergence.py, per logit of a compared row: of both models to fp32, log_softmax and exp; their difference times p,
# and its sum; q - p, and back. Of stored distributions: of one model; logsumexp of a copy for the rest; the gradient.
DIVERGENCE = Operation(forward=Passes(wide=18, casts=3))
STORED_DIVERGENCE = Operation(forward=Passes(wide=12, casts=2))
# Rows that have a loss are gathered, and their gradients scaled; in the batch's order again.
LOSS_ROWS = Operation(forward=Passes(own=2), backward=Passes(own=3))
UNGATHERED = Operation(forward=Passes(), backward=Passes(own=5))
EMBEDDED = Operation(forward=Passes(own=2), backward=Passes(own=3))
FROZEN_EMBEDDED = Operation(forward=Passes(own=2))
EMBEDDING_GRADIENT = Operation(forward=Passes(), backward=Passes(own=1))
TIED_GRADIENTS = Operation(forward=Passes(), backward=Passes(own=3))


def elementwise_bytes(
    architecture: Architecture, model: ModelSpec, batch: MicroBatch, *, on_cuda: bool = True
) -> dict[StepPart, float]:
    """Bytes that a micro-batch reads and writes beside its matrix products, forward, backward and recomputation, by part.

    `on_cuda`: whether it runs on a GPU, or on a CPU that has the fused kernels.
    """
    layer = _layer(architecture, model, batch.rows, on_cuda=on_cuda)
    layer += _attention(architecture, model, batch, on_cuda=on_cuda)
    again = recomputed_layers(architecture, model)
    found: dict[StepPart, float] = defaultdict(float)
    for part, operation, elements in layer:
        forward, backward = operation.forward.bytes(model), operation.backward.bytes(model)
        found[part] += ((architecture.layers + again) * forward + architecture.layers * backward) * elements
    for part, operation, elements in _ends(architecture, model, batch, on_cuda=on_cuda):
        found[part] += (operation.forward.bytes(model) + operation.backward.bytes(model)) * elements
    _add_comparison(found, architecture, model, batch, on_cuda=on_cuda)
    return dict(found)


def _add_comparison(
    found: dict[StepPart, float],
    architecture: Architecture,
    model: ModelSpec,
    batch: MicroBatch,
    *,
    on_cuda: bool,
) -> None:
    """Add the bytes of the divergence from the start model, and of that model's forward pass, which has no adapters."""
    operation = DIVERGENCE if batch.repeats_base else STORED_DIVERGENCE
    compared = batch.compared_rows * architecture.vocabulary
    found[StepPart.HEAD_AND_LOSS] += operation.forward.bytes(model) * compared
    if batch.repeats_base:
        base = model.model_copy(update={"lora": None})
        layer = _layer(architecture, base, batch.rows, on_cuda=on_cuda)
        layer += _attention(architecture, base, batch, on_cuda=on_cuda)
        for part, repeated, elements in layer:
            found[part] += architecture.layers * repeated.forward.bytes(base) * elements


def optimizer_bytes(parameters: float, model: ModelSpec, *, partition: float, micro_batches: int) -> float:
    """Bytes that one rank reads and writes beside that in an optimizer step, by DeepSpeed's ZeRO (stage3.py).

    `parameters`: trained ones of the model, whose gradients are copied into the reduction's bucket in every micro-batch;
    `partition`: those that this rank updates. Per micro-batch it casts and adds their gradients; in the update it flattens
    them, finds the norm, clips, runs Adam (weight, moments: read and written; the gradient read), and casts the weights.
    """
    bucket, accumulate = Passes(own=2), Passes(wide=3, casts=1)
    states = 2 * ADAMW.bytes_per_parameter / _FP32
    update = Passes(wide=2 + 1 + 2 + 1 + states, casts=1)
    gradients = parameters * bucket.bytes(model) + partition * accumulate.bytes(model)
    return micro_batches * gradients + partition * update.bytes(model)


def _norms(width: float, rows: float, *, on_cuda: bool, adds: bool = False) -> Work:
    """Of an RMSNorm over `width` elements of each of `rows`; `adds`: the residual, too."""
    if not on_cuda:
        return [(StepPart.NORMS, CPU_ADD_NORM if adds else CPU_NORM, rows * width)]
    return [
        (StepPart.NORMS, ADD_NORM if adds else NORM, rows * width),
        (StepPart.NORMS, NORM_GRADIENT, NORM_PROGRAMS * width),
    ]


def _layer(architecture: Architecture, model: ModelSpec, rows: float, *, on_cuda: bool) -> Work:
    """Of a decoder layer without its attention: with the norm behind it in the place of its own first one."""
    work = 2 * _norms(architecture.hidden, rows, on_cuda=on_cuda, adds=True)
    if architecture.qk_norms:
        for heads in (architecture.heads, architecture.key_heads):
            work += _norms(architecture.head_dim, rows * heads, on_cuda=on_cuda)
    others = [
        (GATE, rows * architecture.intermediate),
        (SHARED_ROWS, rows * architecture.hidden),
    ]
    if model.lora is not None:
        adapted = architecture.adapted(model.lora)
        inputs, outputs = sum(linear.inputs for linear in adapted), sum(linear.outputs for linear in adapted)
        others += [(ADAPTER_IN, rows * inputs), (ADAPTER_OUT, rows * outputs)]
        if model.lora.dropout:
            others.append((DROPOUT, rows * inputs))
    return work + _of(StepPart.GATES_AND_OTHER_ELEMENTWISE, *others)


def _of(part: StepPart, *operations: tuple[Operation, float]) -> Work:
    return [(part, operation, elements) for operation, elements in operations]


def _attention(architecture: Architecture, model: ModelSpec, batch: MicroBatch, *, on_cuda: bool) -> Work:
    """Of a layer's attention; a tile is taken to hold all keys of its documents, once."""
    query, key = (heads * architecture.head_dim for heads in (architecture.heads, architecture.key_heads))
    spans = _spans(model, batch, query, key, on_cuda=on_cuda) if batch.span_pairs else []
    if not on_cuda or model.attention_backend == "oracle":
        fused = [(FUSED_QUERIES, batch.rows * query), (FUSED_KEYS, batch.rows * key)]
        return [*_of(StepPart.ATTENTION_FUSED, *fused), *spans]
    visits = expected_visits(model, batch, on_cuda=on_cuda)
    kernels, kept = {visit.kernel for visit in visits}, batch.kept_rows
    work = _around_passes(batch, query, key) if FLASH in kernels else []
    queries = batch.live_rows if FLASH in kernels else batch.rows
    if TRITON in kernels:
        others = [(TRITON_QUERIES, queries * query), (TRITON_KEYS, kept * key)]
        others += [(ADDED_KEYS, kept * key)] if FLASH in kernels else []
        work += _of(part_of(TRITON, kernels, on_cuda=True), *others)
    if kernels & {DENSE_CAUSAL, DENSE_BIDIRECTIONAL}:
        others = [(TILE_QUERIES, queries * query), (TILE_KEYS, kept * key)]
        others += [(TILED_KEYS, kept * key)] if FLASH in kernels else []
        scores = {DENSE_CAUSAL: CAUSAL_SCORE, DENSE_BIDIRECTIONAL: SCORE}
        others += [
            (scores[visit.kernel], visit.pairs * architecture.heads)
            for visit in visits
            if visit.kernel in scores
        ]
        if batch.span_pairs:
            tiled = sum(visit.pairs for visit in visits if visit.kernel in scores)
            others += [(PART_SCORE, tiled * architecture.heads), (PART_QUERIES, queries * query)]
        work += _of(part_of(DENSE_BIDIRECTIONAL, kernels, on_cuda=True), *others)
    return work + spans


def _around_passes(batch: MicroBatch, query: int, key: int) -> Work:
    """Of kept rows, whose queries have `query` elements, keys and values `key` each."""
    kept = batch.kept_rows
    if batch.mode == "causal":
        return _of(
            StepPart.ROTATION,
            (ROTATION, kept * (query + key)),
            (PASS_GRADIENTS, kept * (query + 2 * key)),
        )
    rotated = _of(
        StepPart.ROTATION,
        (BOTH_ROTATIONS, kept * (query + key)),
        (FLIPPED_VALUES, kept * key),
        (BOTH_GRADIENTS, kept * (query + 2 * key)),
    )
    return rotated + _of(StepPart.ATTENTION_MERGE, (MERGED_QUERIES, kept * query))


def _spans(model: ModelSpec, batch: MicroBatch, query: int, key: int, *, on_cuda: bool) -> Work:
    """Of the live rows as a causal batch of their own, but for the scores of tiles."""
    queries, keys = batch.live_rows * query, batch.live_rows * key
    work = _of(StepPart.ATTENTION_MERGE, (SPAN_QUERIES, queries))
    work += _of(StepPart.LIVE_ROWS, (SPAN_KEYS, 2 * keys))
    if not on_cuda:
        return work + _of(StepPart.ATTENTION_FUSED, (FUSED_QUERIES, queries), (FUSED_KEYS, keys))
    kernel = span_kernel(model, batch)
    if kernel is FLASH:
        return work + _of(StepPart.ROTATION, (ROTATION, queries + keys), (PASS_GRADIENTS, queries + 2 * keys))
    of_kernel: dict[Kernel, list[tuple[Operation, float]]] = {
        TRITON: [(TRITON_QUERIES, queries), (TRITON_KEYS, keys)],
        DENSE_CAUSAL: [(TILE_QUERIES, queries), (PART_QUERIES, queries), (TILE_KEYS, keys)],
    }
    return work + _of(StepPart.ATTENTION_FUSED, *of_kernel[kernel])


def _ends(architecture: Architecture, model: ModelSpec, batch: MicroBatch, *, on_cuda: bool) -> Work:
    """Of the embedding, the last norm, and the head with its loss."""
    rows, targets = batch.rows * architecture.hidden, batch.head_rows * architecture.hidden
    logits = batch.head_rows * architecture.vocabulary
    logits *= 2 if head_repeats_logits(model, batch.head_rows) else 1
    is_trained = model.lora is None
    head = [(LOGITS if on_cuda else CPU_LOGITS, logits)]
    others = [
        (EMBEDDED if is_trained else FROZEN_EMBEDDED, rows),
        (LOSS_ROWS, targets),
        (UNGATHERED, rows),
    ]
    if is_trained:
        head += [(HEAD_GRADIENT, architecture.embedding_parameters)]
        others += [(EMBEDDING_GRADIENT, architecture.embedding_parameters)]
        if architecture.tied_head:
            others += [(TIED_GRADIENTS, architecture.embedding_parameters)]
    return [
        *_norms(architecture.hidden, batch.rows, on_cuda=on_cuda),
        *_of(StepPart.HEAD_AND_LOSS, *head),
        *_of(StepPart.GATES_AND_OTHER_ELEMENTWISE, *others),
    ]
