"""What the planner said of a run beside what the run shows."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from bico_ds.planner.plan import Plan
from bico_ds.planner.ranges import Range
from bico_ds.runtime.peak_memory import PeakMemory
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import Callback
from bico_ds.training.callbacks.planned import FIRST, LAST, PlannedBesideMeasured
from tests.training.test_callbacks import report, tiny_plan


class Told(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.numbers: list[tuple[int, str, dict[str, float]]] = []

    def on_message(self, text: str) -> None:
        self.lines.append(text)

    def on_numbers(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        self.numbers.append((step, kind, numbers))


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.open()
    run.record(tiny_plan().recipe)
    yield run
    run.close()


def planned(seconds: Range) -> Plan:
    """tiny_bico, its steps within `seconds`."""
    plan = tiny_plan()
    return replace(plan, steps=tuple(replace(step, seconds=seconds) for step in plan.steps))


def beside(plan: Plan, folder: RunFolder) -> tuple[PlannedBesideMeasured, Told]:
    told = Told()
    return PlannedBesideMeasured(plan, PeakMemory(torch.device("cpu")), folder, told), told


def test_the_median_of_the_steps_after_the_first_is_compared_once_each_objective_had_enough(folder):
    callback, told = beside(planned(Range(0.1, 0.3)), folder)
    draw, seconds = np.random.default_rng(), {"ntp": [], "bico": []}
    for step in range(1, 3 * LAST):
        name = "ntp" if step % 2 else "bico"
        seconds[name].append(float(draw.uniform(0.2, 0.6)) * (100 if step < 2 * FIRST - 1 else 1))
        callback.on_step(report(step, objective=name, seconds=seconds[name][-1]))
    callback.on_end(3 * LAST, "done")
    ((step, kind, numbers),) = told.numbers
    assert (step, kind) == (2 * LAST, "plan")
    for name, times in seconds.items():
        median = statistics.median(times[FIRST - 1 : LAST])
        assert numbers[f"plan/step_seconds/{name}/measured"] == pytest.approx(median)
        assert numbers[f"plan/step_seconds/{name}/ratio"] == pytest.approx(median / 0.2)
    assert len(told.lines) == 1


def test_steps_that_a_profile_slowed_are_not_compared(folder):
    callback, told = beside(planned(Range(0.1, 0.3)), folder)
    for step in range(1, 4 * LAST + 1):
        is_recorded = step % 4 < 2
        seconds = 9.0 if is_recorded else 0.2
        name = "ntp" if step % 2 else "bico"
        callback.on_step(replace(report(step, objective=name, seconds=seconds), is_recorded=is_recorded))
    ((_, _, numbers),) = told.numbers
    assert numbers["plan/step_seconds/ntp/measured"] == numbers["plan/step_seconds/bico/measured"] == 0.2


@pytest.mark.parametrize(("seconds", "place"), [(0.05, "below"), (0.2, "inside"), (0.4, "above")])
def test_the_line_says_where_in_the_range_the_run_is(folder, seconds, place):
    callback, told = beside(planned(Range(0.1, 0.3)), folder)
    for step in range(1, FIRST + 1):
        callback.on_step(report(step, seconds=seconds))
    callback.on_end(FIRST, "preempted")
    expected = f"ntp step {seconds:g} s, planned 0.1 to 0.3 s ({place}, {seconds / 0.2:.2g} times the middle)"
    assert expected in told.lines[0] and "bico" not in told.lines[0]
    assert "its tensors alone" in told.lines[0]


def test_an_objective_that_is_drawn_seldom_does_not_hold_the_line_back_for_ever(folder):
    callback, told = beside(planned(Range(0.1, 0.3)), folder)
    for step in range(1, 10 * LAST + 1):
        assert not told.lines
        callback.on_step(report(step))
    assert "ntp step" in told.lines[0] and "bico step" not in told.lines[0]


def test_memory_is_what_the_process_grew_by_since_before_its_model_was_built(folder):
    callback, told = beside(planned(Range(0.1, 0.3)), folder)
    callback.on_step(report(1))
    taken = torch.ones(1 << 26)  # 268 MB
    callback.on_step(report(2))
    del taken
    callback.on_step(report(3))
    callback.on_end(3, "done")
    ((_, _, numbers),) = told.numbers
    assert 0.95 < numbers["plan/memory_bytes/measured"] / (4 << 26) < 1.3


def test_without_known_rates_only_memory_is_compared(folder):
    callback, told = beside(planned(Range(float("nan"), float("nan"))), folder)
    for step in range(1, LAST + 1):
        callback.on_step(report(step))
    callback.on_end(LAST, "done")
    assert "step" not in told.lines[0] and "tensors" in told.lines[0]
    assert all(np.isfinite(value) for value in told.numbers[0][2].values())


def test_run_json_keeps_the_comparison_of_this_start_alone(folder):
    folder.record(tiny_plan().recipe)
    callback, told = beside(planned(Range(0.1, 0.3)), folder)
    callback.on_step(report(1))
    callback.on_end(1, "done")
    first, second = json.loads((folder.path / "run.json").read_text())
    assert "plan" not in first
    measured = told.numbers[0][2]["plan/memory_bytes/measured"]
    assert second["plan"]["memory_bytes/measured"] == measured
    assert second["plan"]["peak_flops"] == 1e9


def test_a_start_that_lost_the_folder_writes_nothing_into_another_start_s_part(folder):
    before = (folder.path / "run.json").read_text()
    folder.lock.run_id = "another"
    callback, _ = beside(planned(Range(0.1, 0.3)), folder)
    callback.on_step(report(1))
    callback.on_end(1, "done")
    assert (folder.path / "run.json").read_text() == before


def test_a_run_goes_on_where_run_json_cannot_be_written(folder):
    (folder.path / "run.json").unlink()
    callback, told = beside(planned(Range(0.1, 0.3)), folder)
    callback.on_step(report(1))
    callback.on_end(1, "done")
    assert "run.json" in told.lines[1]


def test_a_run_without_a_step_is_compared_with_nothing(folder):
    callback, told = beside(planned(Range(0.1, 0.3)), folder)
    callback.on_end(0, "preempted")
    assert told.lines == [] and told.numbers == []
