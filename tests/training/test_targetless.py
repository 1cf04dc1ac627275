"""Counting steps without a target: when the user is told, and when the run ends."""

from __future__ import annotations

import json

import pytest

from bico_ds.training.targetless import MOST_IN_A_ROW, NoTargetsError, TargetlessSteps
from tests.training.test_callbacks import report


def without(step: int, objective: str = "bico"):
    return report(
        step, objective=objective, targets=0, loss=float("nan"), grad_norm=float("nan"), applied=False
    )


def test_they_are_told_ever_more_rarely():
    counted = TargetlessSteps()
    told = []
    for step in range(1, 41):
        message = counted.count(without(2 * step))
        assert counted.count(report(2 * step + 1, objective="bico")) is None
        if message is not None:
            told.append((2 * step, message))
    assert [step for step, _ in told] == [2, 4, 8, 16, 32, 64]
    assert told[0][1] == "step 2: no target for objective 'bico', so no update was made"
    assert told[2][1].endswith("no update was made (4 such steps so far)")


def test_so_many_in_a_row_of_one_objective_end_the_run_whatever_others_do():
    counted = TargetlessSteps()
    for step in range(MOST_IN_A_ROW - 1):
        counted.count(without(step))
        counted.count(report(step, objective="ntp"))
    with pytest.raises(
        NoTargetsError, match=rf"step 500: the last {MOST_IN_A_ROW} steps of objective 'bico'"
    ):
        counted.count(without(500))


def test_a_step_with_a_target_begins_the_row_anew():
    counted = TargetlessSteps()
    for _ in range(3):
        for step in range(MOST_IN_A_ROW - 1):
            counted.count(without(step))
        counted.count(report(1, objective="bico"))


def test_a_resumed_run_counts_on():
    counted = TargetlessSteps()
    for step in range(MOST_IN_A_ROW - 1):
        counted.count(without(step))
    resumed = TargetlessSteps.of(json.loads(json.dumps({"targetless": counted.state()})))
    with pytest.raises(NoTargetsError):
        resumed.count(without(MOST_IN_A_ROW))
    assert TargetlessSteps.of({}) == TargetlessSteps()  # a checkpoint of an earlier program


def test_a_run_needs_one_target_to_be_done():
    counted = TargetlessSteps()
    for step in (1, 2):
        counted.count(without(step))
    counted.require_some(2, 4)  # stopped on request: it goes on later
    with pytest.raises(NoTargetsError, match="none of the 2 steps had a target"):
        counted.require_some(2, 2)
    counted.count(report(3))
    counted.require_some(3, 3)
