"""The loss of held-out texts: the model as it is trained, by the run's own objectives, without dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bico_ds.attention.layout import LayoutPolicy, build_layout
from bico_ds.batch import PackedBatch, total_weight
from bico_ds.evaluation.held_out.batches import FixedBatches
from bico_ds.evaluation.held_out.stores import HeldOutStore
from bico_ds.evaluation.scoring.share import PromptShare, agree, in_order
from bico_ds.model.build import TrainableModel

_Sums = tuple[float, float, int]  # of losses times their weights, of the weights, and the number of targets


def measure(
    model: TrainableModel, stores: Sequence[HeldOutStore], share: PromptShare, policy: LayoutPolicy | None
) -> dict[str, dict[str, dict[str, Any]]] | None:
    """By the names of store and objective the mean `loss` of its targets in nats, as a result file holds it. Collective.

    The mean is weighted as in training. `targets`: how many there are. `identity`: losses compare where it is equal. They do
    not depend on the number of ranks: micro-batches are the same, and their sums are added in one order. `share.synced`:
    the weights are partitioned, so that every rank enters the model equally often. `policy`: of the attention backend.
    Returns None on all ranks where any was asked to stop.
    """
    was_training = model.training
    model.eval()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        for store in stores:
            found[store.spec.name] = {}
            for name, batches in store.batches.items():
                sums = _sums(model, batches, share, policy)
                if sums is None:
                    return None
                losses, weights, targets = map(sum, zip(*sums, strict=True))
                found[store.spec.name][name] = {
                    "loss": losses / weights,
                    "targets": targets,
                    "identity": batches.identity,
                }
    finally:
        model.train(was_training)
    return found


@torch.no_grad()
def _sums(
    model: TrainableModel, batches: FixedBatches, share: PromptShare, policy: LayoutPolicy | None
) -> list[_Sums] | None:
    """Of each micro-batch, on every rank; None where any was asked to stop."""
    found: dict[int, _Sums] = {}
    stopped = False
    for first in range(0, batches.count, share.world_size):
        _, stopped = agree(True, share)
        if stopped:
            break
        number = first + share.rank
        is_own = number < batches.count
        if (
            is_own or share.synced
        ):  # with partitioned weights a rank without a batch takes part with another one
            batch = batches.build(number if is_own else first)
            sums = _sums_of(model, batch, share.device, policy)
            if is_own:
                found[number] = sums
        share.on_batch(int(is_own))
    return in_order(found, batches.count, share, stopped=stopped)


def _sums_of(
    model: TrainableModel, batch: PackedBatch, device: torch.device, policy: LayoutPolicy | None
) -> _Sums:
    if policy is not None:
        batch = replace(batch, layout=build_layout(batch.plan, policy))
    losses = model(batch.to(device)).row_losses.double()
    if batch.loss_weights is not None:
        losses = losses * batch.loss_weights.to(device).double()
    return float(losses.sum()), total_weight(batch), len(batch.targets)
