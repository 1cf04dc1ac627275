"""Activations of one micro-batch on one rank, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from bico_ds.config.schema import ModelSpec
from bico_ds.planner.architecture import Architecture
from bico_ds.planner.items import Item
from bico_ds.planner.ranges import Range
from bico_ds.planner.workload import MicroBatch


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """What the rows of a micro-batch take, without weights and their gradients, at the three moments that can be a peak.

    `kept`: from the forward pass until a layer's backward. `in_head`: besides, while the head computes losses and its
    gradients. `in_layer`: besides, at the peak of the last layer's backward pass (recomputed or not).
    """

    kept: tuple[Item, ...]
    in_head: tuple[Item, ...]
    in_layer: tuple[Item, ...]


def activation_memory(
    architecture: Architecture, model: ModelSpec, batch: MicroBatch, *, on_cuda: bool
) -> ActivationMemory:
    """STUB"""
    size = 2 * batch.rows * architecture.hidden * architecture.layers
    return ActivationMemory(
        kept=(Item(name="layer inputs", bytes=Range.exactly(size)),), in_head=(), in_layer=()
    )
