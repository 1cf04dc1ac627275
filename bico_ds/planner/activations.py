"""Activations of one micro-batch on one rank, in bytes.

What autograd keeps of a layer is a table (`bico_ds.planner.rows.kept`); for the peak of the backward pass its tensors are
replayed in autograd's order (`bico_ds.planner.rows.backward`).

Beside the s·b·h·(34 + 5·a·s/h) bytes per layer of Korthikanti et al. (arXiv 2205.05198, equation 2), in 16 bits: there is no
5·a·s/h, since no kernel here keeps scores; no dropout, and so none of its masks; a gated MLP keeps 3 tensors of the
intermediate size, a plain one 2 of 4h; and keys and values are narrower than queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bico_ds.config.sections.model import LOW_PRECISION_CHUNKS, ModelSpec
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.items import Item
from bico_ds.planner.ranges import Range
from bico_ds.planner.rows.alive import Alive
from bico_ds.planner.rows.attention import (
    INDEX,
    MASKED_SCORES,
    LargestTile,
    flipped_rows,
    largest_tiles,
    tile_indices,
    tiled_scores,
)
from bico_ds.planner.rows.backward import head_backward, layer_backward
from bico_ds.planner.rows.case import FP32, Case, case_of
from bico_ds.planner.rows.forward import layer_forward, passing_forward
from bico_ds.planner.rows.kept import KeptTensor, layer_tensors, norm_tensors
from bico_ds.planner.workload import MicroBatch

# What `_less_one_hot` of bico_ds/model/head_softmax.py makes per row: two int64, two fp32.
_LABEL = 24
# Of `flip_places` of attention/plan.py, per kept row: int32.
_PLACE = 4
# What model/divergence.py has at once per logit of a compared row: log p, log q, p and q, log p - log q, and it times p.
_COMPARED_LOGIT = 6 * FP32


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """What the rows of a micro-batch take, without weights and their gradients, at the moments that can be a peak.

    `kept`: from the forward pass until the last layer's backward pass is over. `passing`: besides, in the forward pass of a
    layer that is recomputed; empty where none is. `in_head`: besides, while the head computes losses and their gradients.
    `in_layer`: besides, at the peak between the head and the end of the last layer's backward pass (recomputed or not);
    after that there are only fewer rows kept.
    """

    kept: tuple[Item, ...]
    passing: tuple[Item, ...]
    in_head: tuple[Item, ...]
    in_layer: tuple[Item, ...]


def activation_memory(
    architecture: Architecture, model: ModelSpec, batch: MicroBatch, *, on_cuda: bool, zero3: bool = False
) -> ActivationMemory:
    """Bytes of all tensors that grow with the rows of `batch`, and of what kernels need to make them.

    `zero3`: DeepSpeed's stage 3 puts a function in the place of `torch.nn.functional.linear` that keeps every input
    (`LinearFunctionForZeroStage3` of its runtime/zero/linear.py), which matters where weights are frozen. What is
    taken to be installed: `bico_ds.planner.rows.case.Case`.
    """
    case = case_of(architecture, model, on_cuda=on_cuda, zero3=zero3)
    every, last = model.activation_checkpointing, architecture.layers - 1
    recomputed = [every > 0 and index % every == 0 for index in range(architecture.layers)]
    layers = [layer_tensors(case, is_first=index == 0) for index in range(architecture.layers)]
    whole = [layer for layer, again in zip(layers[:last], recomputed, strict=False) if not again]
    ends = norm_tensors(case, "last norm", architecture.hidden)
    return ActivationMemory(
        kept=(
            _item(
                "inputs of recomputed layers",
                batch.rows * sum(recomputed) * (case.size * architecture.hidden + FP32),
                f"{sum(recomputed)} layers",
            ),
            _item("layers kept whole", batch.rows * sum(map(_bytes, whole)), f"{len(whole)} layers"),
            *_of_all_layers(case, batch),
        ),
        passing=_passing(case, batch) if any(recomputed) else (),
        in_head=(
            _item(
                "last layer and norm",
                batch.rows * _bytes(ends if recomputed[last] else (*layers[last], *ends)),
                "the norm alone, the layer is recomputed" if recomputed[last] else "kept",
            ),
            *_head(case, model, batch),
        ),
        in_layer=_backward(case, batch, layers[last], ends, recomputed=tuple(recomputed[-2:])),
    )


def _passing(case: Case, batch: MicroBatch) -> tuple[Item, ...]:
    peaks = []
    for tile in largest_tiles(case, batch):
        alive = Alive(batch.rows)
        passing_forward(alive, case, batch, tile)
        peaks.append(alive.peak)
    low, high = (sum(peak.values()) for peak in peaks)
    name = "forward pass of a recomputed layer"
    return (Item(name=name, bytes=Range(min(low, high), max(low, high)), how=", ".join(peaks[-1])),)


def _backward(
    case: Case,
    batch: MicroBatch,
    layer: tuple[KeptTensor, ...],
    last_norm: tuple[KeptTensor, ...],
    *,
    recomputed: tuple[bool, ...],
) -> tuple[Item, ...]:
    """At the peak from the end of the last layer's forward pass to that of its backward pass."""
    low, high = (
        _peak(case, batch, layer, last_norm, recomputed=recomputed, tile=tile)
        for tile in largest_tiles(case, batch)
    )
    kept = {tensor.name for tensor in (*layer, *last_norm)}
    others = [name for name in high if name not in kept]
    how = "recomputed" if any(recomputed) else "kept, less what is freed"
    return (
        Item(name="last layer", bytes=_sum(low, high, [name for name in high if name in kept]), how=how),
        Item(name="gradients of rows", bytes=_sum(low, high, others), how=", ".join(others)),
    )


def _sum(low: dict[str, float], high: dict[str, float], names: list[str]) -> Range:
    return Range(sum(low.get(name, 0.0) for name in names), sum(high[name] for name in names))


def _peak(
    case: Case,
    batch: MicroBatch,
    layer: tuple[KeptTensor, ...],
    last_norm: tuple[KeptTensor, ...],
    *,
    recomputed: tuple[bool, ...],
    tile: LargestTile,
) -> dict[str, float]:
    """Bytes by name. `recomputed`: of the last two layers; where only the one before the last is, the peak may be there."""
    alive = Alive(batch.rows)
    if not recomputed[-1]:
        alive.keep(layer)
        layer_forward(alive, case, recomputed=False)
    alive.keep(last_norm)
    head_backward(alive, case, batch)
    if not recomputed[-1]:
        layer_backward(alive, case, batch, tile)
        alive.only("gradient of the layer")
    if any(recomputed):
        # The first norm has run before the layer, and what it keeps is there anyhow.
        held = {tensor.name for tensor in norm_tensors(case, "first norm", case.shapes.hidden)}
        alive.keep(tensor for tensor in layer if tensor.name not in held)
        layer_forward(alive, case, recomputed=True)
        layer_backward(alive, case, batch, tile)
    return alive.peak


def _of_all_layers(case: Case, batch: MicroBatch) -> Iterator[Item]:
    """What all layers read: rotary tables, the batch with its plan and layout, and the masks of its tiles."""
    yield _item("rotary tables", 2 * case.size * case.shapes.head_dim * batch.rows, "cos and sin of each row")
    # The layout has a plan of its own for the flash kernel, and a table of rows for the kernels that serve all.
    tables = 2 * INDEX * (flipped_rows(batch) + batch.live_rows) + _PLACE * batch.kept_rows
    plan = tables * (2 if case.attention == "flash" else 1)
    entry = {"fused": 2 * INDEX, "triton": 2 * FP32, "flash": 0 if case.tiles_live else 2 * FP32}
    served = batch.live_rows if case.attention == "flash" else batch.rows
    table = entry.get(case.attention, 0) * served
    if batch.span_pairs:  # where they lie, and the plan and table of the layout within the layout
        table += (INDEX + _PLACE + entry.get(case.attention, 0)) * batch.live_rows
    ids = 2 * INDEX * (batch.rows + batch.head_rows)
    yield _item("batch, plan and layout", ids + plan + table, "bico_ds/batch.py, attention/layout.py")
    if (scores := tiled_scores(case, batch)).high:
        yield Item(name="rows of tiles", bytes=tile_indices(case, batch), how="bico_ds/attention/tiles.py")
        masks = (2 if batch.mode == "causal" else 3) * case.size
        low = scores.low if scores.high <= MASKED_SCORES else 0
        high = min(scores.high, MASKED_SCORES)
        yield Item(
            name="masks of tiles", bytes=Range(low, high).times(masks), how="bico_ds/attention/tiles.py"
        )


def _head(case: Case, model: ModelSpec, batch: MicroBatch) -> Iterator[Item]:
    """`chunked_cross_entropy` of bico_ds/model/head.py, without the gradient of its weight."""
    rows = batch.head_rows
    chunk = min(model.loss_chunk_rows, rows)
    # Without Triton the softmax has a copy of the logits in fp32.
    exact = 0 if case.on_cuda else FP32
    logits = (case.size + exact) * max(chunk * case.shapes.vocabulary, rows)
    compared = _COMPARED_LOGIT * min(chunk, batch.compared_rows) * case.shapes.vocabulary
    how = f"of {chunk:.0f} rows, in {model.dtype}{' and in fp32' if exact else ''}"
    if compared > logits:
        how = f"of {min(chunk, batch.compared_rows):.0f} rows, of both models, in fp32 (model/divergence.py)"
    yield _item("logits of a chunk", max(logits, compared), how)
    if batch.compared_rows:
        states = 3 * case.size * case.shapes.hidden * batch.compared_rows
        yield _item("compared rows", states, "hidden states of both models, and their gradient")
    if batch.compared_rows and model.lora is None:
        weight = case.size * case.shapes.vocabulary * case.shapes.hidden
        yield _item("the divergence's gradient of the head", weight, "beside that of the loss")
    by_vocabulary = case.size < FP32 and rows > LOW_PRECISION_CHUNKS * chunk
    labels = 0 if case.on_cuda else _LABEL * (rows if by_vocabulary else chunk)
    hidden = case.size * case.shapes.hidden * (batch.rows + 2 * rows) + FP32 * rows + labels
    yield _item("rows with a loss", hidden, "the last hidden states, those with a loss, and their gradients")


def _bytes(tensors: tuple[KeptTensor, ...]) -> float:
    return sum(tensor.bytes for tensor in tensors)


def _item(name: str, size: float, how: str) -> Item:
    return Item(name=name, bytes=Range.exactly(size), how=how)
