"""Micro-batches that a message names, and files in logs/ that hold what they are: enough to reproduce a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bico_ds.batch import PackedBatch, total_weight
from bico_ds.common.files import write_atomically
from bico_ds.runtime.distributed import all_gather_objects
from bico_ds.training.run import Run

_Culprit = tuple[float, int, list[list[int]]]


def write_micro_batches(path: Path, batches: Sequence[PackedBatch], losses: Sequence[float]) -> str:
    """Write micro-batches, each with the weighted sum of its losses, as JSON; returns what to say of the file.

    That it could not be written is no error: a message without it says more than none.
    """
    content = [_content(batch, loss) for batch, loss in zip(batches, losses, strict=True)]
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(content))
    except OSError as error:
        return f"not written to {path}: {error.strerror}"
    return f"see {path}"


def name_worst(step: int, batches: Sequence[PackedBatch], losses: Sequence[torch.Tensor], run: Run) -> str:
    """A line that names the micro-batch of all ranks with the largest mean loss; its rank writes it to a file. Collective.

    `step` counts from 1; `losses` holds the weighted sum, in nats, of each of this rank's `batches`.
    """
    means = [float(loss) / (total_weight(batch) or 1.0) for loss, batch in zip(losses, batches, strict=True)]
    worst = max(range(len(batches)), key=means.__getitem__)
    mine: _Culprit = (means[worst], run.ranks.rank, batches[worst].documents.tolist())
    loss, rank, documents = max(all_gather_objects(mine))
    path, where = run.folder.logs / f"spike-step-{step:06d}-rank-{rank}.json", None
    if rank == run.ranks.rank:
        where = write_micro_batches(path, [batches[worst]], [float(losses[worst])])
    where = next(filter(None, all_gather_objects(where)))
    return f"largest loss {loss:.3g}, rank {rank}: documents (source, id, piece) {few(documents)}, {where}"


def few(documents: list[list[int]], most: int = 10) -> str:
    """The first of the documents, and how many more there are."""
    shown = ", ".join(str(tuple(document)) for document in documents[:most])
    return shown + (f" and {len(documents) - most} more" if len(documents) > most else "")


def _content(batch: PackedBatch, loss: float) -> dict[str, Any]:
    return {
        "loss": str(loss),
        "mode": batch.plan.mode,
        "documents": batch.documents.tolist(),
        "input_ids": batch.input_ids.tolist(),
        "position_ids": batch.position_ids.tolist(),
        "cu_seqlens": batch.plan.cu_seqlens.tolist(),
        "loss_rows": batch.loss_rows.tolist(),
        "targets": batch.targets.tolist(),
        "loss_weights": None if batch.loss_weights is None else batch.loss_weights.tolist(),
    }
