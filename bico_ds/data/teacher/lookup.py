"""The stored distributions of a batch's rows, in the loader's worker.

Shape legend: D documents, M rows that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from bico_ds.batch import PackedBatch, TeacherRows
from bico_ds.common.errors import UserError
from bico_ds.data.teacher.stored import StoredTeacher
from bico_ds.documents import Documents

_APART = "let its 'sources' name none of those that retention.on names"


def teacher_rows(
    teachers: Mapping[int, StoredTeacher],
    batch: PackedBatch,
    index: torch.Tensor,
    documents: Documents,
    sequences: NDArray[np.int64],
) -> TeacherRows:
    """Return the distributions at the loss rows `index` [M] of a causal batch, in their order.

    `documents` are those that the batch was built of; `sequences` int64 [D]: their numbers in the sequences of their source.
    Raises `UserError` where the objective cuts documents otherwise, or predicts something else than the next token.
    """
    rows = batch.loss_rows[index]
    of_row = np.repeat(np.arange(len(documents)), batch.plan.cu_seqlens.diff().numpy())
    document, position = of_row[rows.numpy()], batch.position_ids[rows].numpy()
    _check(teachers, documents, sequences, document, position, batch.targets[index].numpy())
    parts, places = [], []
    for source, teacher in teachers.items():
        place = np.flatnonzero(documents.source[document] == source)
        parts.append(teacher.read(sequences[document[place]], position[place]))
        places.append(place)
    back = torch.from_numpy(np.argsort(np.concatenate(places)))
    columns = ("ids", "log_probs", "target_log_probs")
    return TeacherRows(**{name: torch.cat([getattr(part, name) for part in parts])[back] for name in columns})


def _check(
    teachers: Mapping[int, StoredTeacher],
    documents: Documents,
    sequences: NDArray[np.int64],
    document: NDArray[np.int64],
    position: NDArray[np.int64],
    targets: NDArray[np.int64],
) -> None:
    for source, teacher in teachers.items():
        own = np.unique(document[documents.source[document] == source])
        known = sequences[own] < len(teacher.lengths)
        if not known.all() or (teacher.lengths[sequences[own]] != documents.lengths[own]).any():
            raise UserError(
                "retention.teacher holds distributions over documents as they are, cut by data.capacity; this objective "
                f"expands them, and cuts them otherwise; {_APART}"
            )
    following = documents.offsets[document] + position + 1
    if (following >= documents.offsets[document + 1]).any() or (
        documents.token_ids[following] != targets
    ).any():
        raise UserError(
            "retention.teacher holds distributions of the next token, and this objective predicts another; "
            f"{_APART}"
        )
