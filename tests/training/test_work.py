"""What each objective has done since step 0, and its shares of it: in the metrics, in run.json, and after a resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bico_ds.evaluation.report.runs import load_runs
from bico_ds.planner.flops import useful_flops
from bico_ds.runtime.run_folder import RunFolder
from bico_ds.training.callbacks.base import Callback, RunStart, StepReport
from bico_ds.training.callbacks.monitor import StepMonitor
from bico_ds.training.callbacks.work import ObjectiveWork
from tests.training.test_callbacks import folder, report, tiny_plan  # noqa: F401

OBJECTIVES = ("ntp", "bico")
COUNTS = {"rows": "kept_tokens", "tokens": "represented_tokens", "seconds": "seconds", "updates": "applied"}


class Lines(Callback):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_message(self, text: str) -> None:
        self.lines.append(text)


def steps_of(count: int) -> list[StepReport]:
    """Steps whose objectives have other rows, tokens and pairs, and of which some make no update."""
    rng = np.random.default_rng()
    reports = []
    for step in range(1, count + 1):
        # Both objectives are in it, and at least one step of each makes an update.
        index = step % 2 if step < 5 else int(rng.integers(2))
        rows, targets, pairs, tokens = rng.integers(1, 1000, 4).tolist()
        reports.append(
            report(
                step,
                objective=OBJECTIVES[index],
                kept_tokens=rows,
                represented_tokens=tokens,
                targets=targets,
                pairs=pairs,
                seconds=float(rng.uniform(0.1, 2)),
                applied=step < 5 or bool(rng.integers(2)),
            )
        )
    return reports


class Run:
    """One start of a run, from `first_step` on."""

    def __init__(self, folder: RunFolder, plan, *, first_step: int = 0, saved=None, every: int = 1) -> None:  # noqa: F811
        recipe = tiny_plan().recipe
        spec = recipe.monitor.model_copy(update={"every_steps": every})
        self.told = Lines()
        self.work = ObjectiveWork(plan, folder, self.told)
        self.monitor = StepMonitor(spec, folder, None, None, self.work)
        start = RunStart(recipe=recipe, first_step=first_step, total_steps=99, summary={}, saved=saved or {})
        for callback in (self.work, self.monitor):
            callback.on_start(start)

    def take(self, reports: list[StepReport]) -> None:
        for one in reports:
            self.work.on_step(one)
            self.monitor.on_step(one)

    def state(self) -> dict:
        return json.loads(json.dumps(self.work.state() | self.monitor.state()))


@pytest.fixture
def started(folder) -> RunFolder:  # noqa: F811
    (folder.path / "run.json").write_text(json.dumps([{"run_id": folder.lock.run_id}]))
    return folder


def last_line(folder: RunFolder) -> dict:  # noqa: F811
    return json.loads(folder.metrics_file.read_text().splitlines()[-1])


def test_work_is_that_of_all_steps_by_objective_and_flops_those_of_mfu(started):
    plan, reports = tiny_plan(), steps_of(12)
    run = Run(started, plan)
    run.take(reports)
    line, flops = last_line(started), {}
    for name in OBJECTIVES:
        own = [one for one in reports if one.objective == name]
        assert line[f"work/steps/{name}"] == len(own)
        for what, key in COUNTS.items():
            assert line[f"work/{what}/{name}"] == pytest.approx(sum(getattr(one, key) for one in own))
        flops[name] = useful_flops(
            plan.architecture,
            plan.recipe.model,
            rows=sum(one.kept_tokens for one in own),
            targets=sum(one.targets for one in own),
            pairs=sum(one.pairs for one in own),
        )
        assert line[f"work/flops/{name}"] == pytest.approx(flops[name])
        assert line[f"share/steps/{name}"] == pytest.approx(len(own) / len(reports))
    assert line["share/flops/bico"] == pytest.approx(flops["bico"] / sum(flops.values()))
    assert line["share/tokens/ntp"] + line["share/tokens/bico"] == pytest.approx(1)


@pytest.mark.parametrize("every", [1, 4])
def test_a_resumed_run_tells_what_an_uninterrupted_one_tells(started, every):
    plan, reports = tiny_plan(), steps_of(12)
    whole = Run(started, plan, every=every)
    whole.take(reports)
    expected = last_line(started)
    started.metrics_file.unlink()
    first = Run(started, plan, every=every)
    first.take(reports[:7])
    resumed = Run(started, plan, first_step=7, saved=first.state(), every=every)
    resumed.take(reports[7:])
    assert last_line(started) == pytest.approx(expected)


def test_an_evaluation_between_two_lines_of_steps_is_compared_by_the_work_done_by_then(started):
    run, reports = Run(started, tiny_plan(), every=10), steps_of(13)
    run.take(reports)
    run.monitor.on_numbers(13, "evaluation", {"evaluation/n2d/contains": 0.5})
    (compared,) = load_runs([started.path])
    assert compared.work.updates == sum(one.applied for one in reports)
    assert compared.work.rows == sum(one.kept_tokens for one in reports)


def test_a_run_whose_checkpoint_does_not_know_what_came_before_tells_nothing(started):
    run = Run(started, tiny_plan(), first_step=7, saved={"unwritten_steps": []})
    run.take(steps_of(12)[7:])
    assert not [tag for tag in last_line(started) if tag.startswith(("work/", "share/"))]
    assert "work" not in run.state()
    run.work.on_end(12, "done")
    assert run.told.lines == []


def test_the_end_has_a_line_and_run_json_the_work(started):
    run = Run(started, tiny_plan())
    run.take([report(1, seconds=1.0), report(2, objective="bico", represented_tokens=300)])
    run.work.on_end(2, "done")
    (line,) = run.told.lines
    assert "ntp 1 updates, 90 rows, 100 tokens" in line
    assert "50.0% of the steps, 75.0% of the tokens" in line
    (start,) = json.loads((started.path / "run.json").read_text())
    assert start["work"]["ntp"]["tokens"] == 100 and start["work"]["ntp"]["seconds"] == 1.0


def test_without_a_plan_all_but_flops_is_told(started):
    run = Run(started, None)
    run.take([report(1)])
    assert last_line(started)["work/rows/ntp"] == 90
    assert not [tag for tag in last_line(started) if "flops" in tag]
