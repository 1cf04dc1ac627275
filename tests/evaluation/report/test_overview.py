"""Pictures of many runs: each run stays apart from the others, and every bar has its score."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes

from bico_ds.evaluation.report import plots
from bico_ds.evaluation.report.overview import overview
from bico_ds.evaluation.report.runs import ComparedRun, Work
from bico_ds.evaluation.results import EvaluationResult, TaskResult


def _run(label: str, scores: dict[str, float], work: Work | None = None) -> ComparedRun:
    tasks = {
        name: TaskResult(headline="contains", metrics={"contains": score}) for name, score in scores.items()
    }
    return ComparedRun(label=label, final=EvaluationResult(tasks=tasks), curves={}, work=work)


def _bars(axes: Axes) -> dict[int, float]:
    """The length of each bar, by its line."""
    return {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axes.patches}


def test_each_task_has_a_panel_in_which_every_bar_is_the_score_of_its_run():
    scores = np.random.default_rng().random((9, 5))
    runs = [
        _run(f"run_{number}", {f"task_{task}": score for task, score in enumerate(row)})
        for number, row in enumerate(scores)
    ]
    del runs[3].final.tasks["task_2"]  # a run that was not asked leaves its line empty
    panels = {axes.get_title().split("\n")[0]: axes for axes in overview(runs).axes}
    for task in range(5):
        asked = [number for number in range(9) if (number, task) != (3, 2)]
        assert _bars(panels[f"task_{task}"]) == {n: scores[n, task] for n in asked}
    first, *_ = panels.values()  # the others share its axis
    assert [label.get_text() for label in first.get_yticklabels()] == [run.label for run in runs]
    assert first.yaxis_inverted()


def test_the_work_of_runs_has_bars_where_it_is_known():
    known = Work(updates=700, rows=431_203, tokens=440_000, flops=1.5e12, seconds=61.2)
    runs = [
        _run("a", {"n2d": 0.5}),
        _run("b", {"n2d": 0.5}, known),
        _run("c", {"n2d": 0.5}, known._replace(flops=None)),
    ]
    panels = {axes.get_title(): _bars(axes) for axes in overview(runs).axes}
    assert panels["updates"] == {1: 700, 2: 700}
    assert panels["tokens through the model"] == {1: 431_203, 2: 431_203}
    assert panels["FLOPs"] == {1: 1.5e12}
    assert panels["seconds of training steps"] == {1: 61.2, 2: 61.2}
    assert "FLOPs" not in {axes.get_title() for axes in overview(runs[:1]).axes}


def test_the_lines_of_the_first_56_runs_differ_by_colour_or_marker():
    looks = {(line.get_color(), line.get_marker()) for line in map(plots.line_of, range(56))}
    assert len(looks) == 56


@pytest.mark.parametrize("of", [2, 9, 20])
def test_a_line_that_lies_below_others_is_wider_but_never_twice_as_wide(of):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    for number in range(of):
        run = ComparedRun(
            label=str(number), final=EvaluationResult(tasks={}), curves={"n2d": [(1, 0.5), (2, 1.0)]}
        )
        plots._draw(axes, run, "n2d", number, of=of)
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1] and widths[0] <= 2 * widths[-1]
