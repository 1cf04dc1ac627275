"""A loss or gradient that is not finite: stop before the update, and write down the micro-batches that caused it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch

from bico_ds.batch import PackedBatch
from bico_ds.common.errors import RunError
from bico_ds.runtime.distributed import all_gather_objects
from bico_ds.training.micro_batches import few, write_micro_batches
from bico_ds.training.run import Run

_MOST_RANKS = 8  # that a message names; every rank reports it to all


class NonFiniteError(RunError):
    """A loss or gradient is not finite. The weights are those of the step before, unless the message states otherwise."""


def stop(step: int, batches: Sequence[PackedBatch], losses: Sequence[torch.Tensor], run: Run) -> NoReturn:
    """Raise `NonFiniteError`, the same on all ranks; `step` counts from 0. Collective.

    `losses`: of each micro-batch the sum of its losses, with its divergence. For each that is not finite, the error names
    rank and documents, and the rank writes the micro-batch to a file in logs/. Where only a gradient is not finite, no
    micro-batch can be named.
    """
    ranks, folder = run.ranks, run.folder
    values = [float(loss) for loss in losses]
    bad = [index for index, value in enumerate(values) if not math.isfinite(value)]
    mine = None
    if bad:
        path = folder.logs / f"nonfinite-step-{step + 1:06d}-rank-{ranks.rank}.json"
        where = write_micro_batches(path, [batches[i] for i in bad], [values[i] for i in bad])
        documents = [document for i in bad for document in batches[i].documents.tolist()]
        mine = f"rank {ranks.rank}: documents (source, id, piece) {few(documents)}, {where}"
    lines = [line for line in all_gather_objects(mine) if line is not None]
    if not lines:
        raise NonFiniteError(
            f"step {step + 1}: the losses are finite but the gradient is not; the weights are unchanged. "
            "Lower optimizer.lr or training.max_grad_norm, or go on with training.on_nonfinite=skip"
        )
    if len(lines) > _MOST_RANKS:
        lines[_MOST_RANKS:] = [f"and {len(lines) - _MOST_RANKS} more ranks, each with its file there"]
    raise NonFiniteError(
        f"step {step + 1}: the loss is not finite; the weights are unchanged.\n" + "\n".join(lines)
    )
