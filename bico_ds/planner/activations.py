"""Activations of one micro-batch on one rank, in bytes.

What autograd keeps of a layer is a table (`bico_ds.planner.rows.kept`); for the peak of the backward pass its tensors are
replayed in autograd's order (`bico_ds.planner.rows.backward`).

Beside the s·b·h·(34 + 5·a·s/h) bytes per layer of Korthikanti et al. (arXiv 2205.05198, equation 2), in 16 bits: there is no
5·a·s/h, since no kernel here keeps scores; no dropout, and so none of its masks; a gated MLP keeps 4 tensors of the
intermediate size (fused: 3), a plain one 2 of 4h; keys and values are narrower than queries; and a norm of Hugging Face
keeps its input in fp32, and it again before its weight, 6 bytes per element, where a LayerNorm keeps 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bico_ds.config.schema import ModelSpec
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.items import Item
from bico_ds.planner.ranges import Range
from bico_ds.planner.rows.alive import Alive
from bico_ds.planner.rows.attention import flipped_rows, tiled_pairs
from bico_ds.planner.rows.backward import head_backward, layer_backward
from bico_ds.planner.rows.case import FP32, Case, case_of
from bico_ds.planner.rows.kept import KeptTensor, layer_tensors, norm_tensors
from bico_ds.planner.workload import MicroBatch

_INDEX = 8  # bytes, int64
_MASKED_SCORES = 1 << 22  # `_KEPT_SCORES` of bico_ds/attention/tiles.py


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """What the rows of a micro-batch take, without weights and their gradients, at the moments that can be a peak.

    `kept`: from the forward pass until the last layer's backward pass is over. `in_head`: besides, while the head computes
    losses and their gradients. `in_layer`: besides, at the peak between the head and the end of the last layer's backward
    pass (recomputed or not); after that there are only fewer rows kept.
    """

    kept: tuple[Item, ...]
    in_head: tuple[Item, ...]
    in_layer: tuple[Item, ...]


def activation_memory(
    architecture: Architecture, model: ModelSpec, batch: MicroBatch, *, on_cuda: bool, zero3: bool = False
) -> ActivationMemory:
    """Bytes of all tensors that grow with the rows of `batch`, and of what kernels need to make them.

    `zero3`: DeepSpeed's stage 3 puts a function in the place of `torch.nn.functional.linear` that keeps every input
    (`LinearFunctionForZeroStage3` of its runtime/zero/linear.py), which matters where weights are frozen. On a CPU the
    fused kernels of `bico_ds/native` are assumed.
    """
    case = case_of(architecture, model, on_cuda=on_cuda, zero3=zero3)
    every, last = model.activation_checkpointing, architecture.layers - 1
    recomputed = [every > 0 and index % every == 0 for index in range(architecture.layers)]
    layers = [layer_tensors(case, is_first=index == 0) for index in range(architecture.layers)]
    whole = [layer for layer, again in zip(layers[:last], recomputed, strict=False) if not again]
    ends = norm_tensors(case, "last norm", architecture.hidden)
    before_head = [*ends] if recomputed[last] else [*layers[last], *ends]
    return ActivationMemory(
        kept=(
            _item(
                "inputs of recomputed layers",
                batch.rows * sum(recomputed) * case.size * architecture.hidden,
                f"{sum(recomputed)} layers",
            ),
            _item("layers kept whole", batch.rows * sum(map(_bytes, whole)), f"{len(whole)} layers"),
            *_of_all_layers(case, batch),
        ),
        in_head=(
            _item("the end of the model", batch.rows * _bytes(before_head), "last norm, last layer if kept"),
            *_head(case, model, batch),
        ),
        in_layer=_backward(case, batch, before_head, layers[last] if recomputed[last] else ()),
    )


def _backward(
    case: Case, batch: MicroBatch, kept: list[KeptTensor], recomputed: tuple[KeptTensor, ...]
) -> tuple[Item, ...]:
    """At the peak, of the tensors of the last layer and norm: those `kept`, and those made again."""
    alive = Alive(batch.rows)
    alive.keep(kept)
    head_backward(alive, case, batch)
    # Where no copy in fp32 is made, the first norm keeps the layer's input itself, which checkpointing keeps anyhow.
    held = {"input of the first norm"} if case.fused or case.size == FP32 else set()
    alive.keep(tensor for tensor in recomputed if tensor.name not in held)
    layer_backward(alive, case, batch)
    of_layer = {tensor.name for tensor in (*kept, *recomputed)}
    saved = sum(size for name, size in alive.peak.items() if name in of_layer)
    gradients = [name for name in alive.peak if name not in of_layer]
    return (
        _item("last layer", saved, "recomputed" if recomputed else "kept, what is not yet freed"),
        _item("gradients of rows", sum(alive.peak.values()) - saved, ", ".join(gradients)),
    )


def _of_all_layers(case: Case, batch: MicroBatch) -> Iterator[Item]:
    """What all layers read: rotary tables, the batch with its plan and layout, and the masks of its tiles."""
    yield _item("rotary tables", 2 * case.size * case.shapes.head_dim * batch.rows, "cos and sin of each row")
    # The layout has a plan of its own for the flash kernel, and a table of rows for the kernels that serve all.
    plan = 2 * _INDEX * (flipped_rows(batch) + batch.live_rows) * (2 if case.attention == "flash" else 1)
    table = {"fused": 2 * _INDEX, "triton": 2 * FP32}.get(case.attention, 0) * batch.rows
    ids = 2 * _INDEX * (batch.rows + batch.head_rows)
    yield _item("batch, plan and layout", ids + plan + table, "bico_ds/batch.py, attention/layout.py")
    scores = min(tiled_pairs(case, batch), _MASKED_SCORES) if case.attention in ("flash", "tiles") else 0
    if scores:
        masks = (2 if batch.mode == "causal" else 3) * case.size
        yield Item(name="masks of tiles", bytes=Range(0, masks * scores), how="bico_ds/attention/tiles.py")


def _head(case: Case, model: ModelSpec, batch: MicroBatch) -> Iterator[Item]:
    """`chunked_cross_entropy` of bico_ds/model/head.py, without the gradient of its weight."""
    rows = batch.head_rows
    chunk = min(model.loss_chunk_rows, rows)
    logits = (case.size + FP32) * max(chunk * case.shapes.vocabulary, rows)
    yield _item("logits of a chunk", logits, f"of {chunk:.0f} rows, in {model.dtype} and in fp32")
    hidden = case.size * case.shapes.hidden * (batch.rows + 2 * rows) + FP32 * rows
    yield _item("rows with a loss", hidden, "the last hidden states, those with a loss, and their gradients")


def _bytes(tensors: tuple[KeptTensor, ...] | list[KeptTensor]) -> float:
    return sum(tensor.bytes for tensor in tensors)


def _item(name: str, size: float, how: str) -> Item:
    return Item(name=name, bytes=Range.exactly(size), how=how)
