"""Pictures of many runs: each run stays apart from the others, and every bar has its score."""

from __future__ import annotations

import numpy as np
import pytest

from bico_ds.evaluation.report import plots
from bico_ds.evaluation.report.overview import overview
from bico_ds.evaluation.report.runs import ComparedRun
from bico_ds.evaluation.results import EvaluationResult, TaskResult


def _run(label: str, scores: dict[str, float]) -> ComparedRun:
    tasks = {
        name: TaskResult(headline="contains", metrics={"contains": score}) for name, score in scores.items()
    }
    return ComparedRun(label=label, final=EvaluationResult(tasks=tasks), curves={})


def test_each_task_has_a_panel_in_which_every_bar_is_the_score_of_its_run():
    scores = np.random.default_rng().random((9, 5))
    runs = [
        _run(f"run_{number}", {f"task_{task}": score for task, score in enumerate(row)})
        for number, row in enumerate(scores)
    ]
    del runs[3].final.tasks["task_2"]  # a run that was not asked leaves its line empty
    panels = {axes.get_title(): axes for axes in overview(runs).axes}
    for task in range(5):
        bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in panels[f"task_{task}"].patches}
        asked = [number for number in range(9) if (number, task) != (3, 2)]
        assert {n: bar.get_width() for n, bar in bars.items()} == {n: scores[n, task] for n in asked}
    first, *_ = panels.values()  # the others share its axis
    assert [label.get_text() for label in first.get_yticklabels()] == [run.label for run in runs]
    assert first.yaxis_inverted()


def test_the_lines_of_the_first_56_runs_differ_by_colour_or_marker():
    looks = {(line.get_color(), line.get_marker()) for line in map(plots._line, range(56))}
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
