"""The useful operations of a step on a real batch, by the planner's convention (`bico_ds/planner/flops.py`)."""

from __future__ import annotations

from bico_ds.batch import PackedBatch
from bico_ds.config.sections.model import ModelSpec
from bico_ds.planner.architecture import read_architecture
from bico_ds.planner.flops import useful_flops


def flops_of_step(model: ModelSpec, batch: PackedBatch) -> float:
    """Of one optimizer step on this micro-batch, forward and backward."""
    return useful_flops(
        read_architecture(model),
        model,
        rows=len(batch.input_ids),
        targets=len(batch.targets),
        pairs=batch.plan.num_pairs,
    )


def head_share(model: ModelSpec, batch: PackedBatch) -> float:
    """The share of the head's product in `flops_of_step`."""
    head = useful_flops(read_architecture(model), model, rows=0, targets=len(batch.targets), pairs=0)
    return head / flops_of_step(model, batch)
