"""Texts that an objective makes longer fill bins and never overfill them, long documents in pieces too."""

from __future__ import annotations

import numpy as np
import pytest

from bico_ds.common.errors import UserError
from bico_ds.config.objectives.masked_ft import MaskedFtSpec
from bico_ds.objectives.masked_ft import MaskedFineTuning
from bico_ds.objectives.schedule import ObjectiveSchedule
from tests.data.loading.loaders import make
from tests.data.stores import BOS

INSTRUCTION, SEPARATOR = (7, 8, 9), (5, 6)


def schedule_of_masked_ft() -> ObjectiveSchedule:
    objective = MaskedFineTuning(
        spec=MaskedFtSpec(), mask_id=0, special_ids=(BOS,), instruction=INSTRUCTION, separator=SEPARATOR
    )
    return ObjectiveSchedule([objective], [1.0], seed=1)


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_bins_hold_both_copies_of_every_piece_with_instruction_and_separator(world, overlong):
    loader = make(world, schedule=schedule_of_masked_ft(), overlong=overlong, capacity=64)
    pieces, tokens = [], 0
    for step in range(loader.total_steps(1)):
        for batch in loader.step(step).batches:
            rows = np.diff(batch.plan.cu_seqlens.numpy())
            assert rows.sum() <= 64
            assert batch.represented_tokens == (rows.sum() - 5 * len(rows)) / 2 == len(batch.targets)
            later = ((batch.documents[:, 2] > 0) & (batch.documents[:, 0] == 0)).numpy()
            firsts = batch.plan.cu_seqlens.numpy()[:-1][later] + len(INSTRUCTION)
            text = firsts + (rows[later] - 5) // 2 + len(SEPARATOR)
            assert set(batch.input_ids[np.concatenate([firsts, text])].tolist()) <= {BOS}
            pieces += batch.documents[:, 2].tolist()
            tokens += batch.represented_tokens
    assert (max(pieces) > 0) == (overlong == "split")
    report = loader.report()[0]
    assert report.longest == 2 * 29 + 5
    assert report.fill > 0.8


def test_a_capacity_that_no_text_fits_is_refused_with_what_it_takes(world):
    with pytest.raises(
        UserError, match=r"data\.capacity is 8: too small .* which make 9 of it; raise data\.capacity"
    ):
        make(world, schedule=schedule_of_masked_ft(), capacity=8)
