"""One picture of many runs: a bar for every run, in a panel for every task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bico_ds.evaluation.report.plots import METRIC_NAMES, colour_of
from bico_ds.evaluation.report.runs import ComparedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS_PER_LINE = 4


def plot_overview(runs: Sequence[ComparedRun], path: Path) -> None:
    """Write `overview` as a PNG."""
    overview(runs).savefig(path, dpi=150)


def overview(runs: Sequence[ComparedRun]) -> Figure:
    """The final headline scores of each task with their 95 % intervals; runs from top to bottom."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(name for run in runs for name in run.final.tasks))
    lines = -(-len(tasks) // _PANELS_PER_LINE)
    size = (12, lines * (1.0 + 0.3 * len(runs)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, _PANELS_PER_LINE, sharey=True, squeeze=False).ravel()
    for axes, task in zip(panels, tasks, strict=False):
        _draw_scores(axes, runs, task)
    for axes in panels:
        _dress(axes, [run.label for run in runs])
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    return figure


def _draw_scores(axes: Any, runs: Sequence[ComparedRun], task: str) -> None:
    for number, run in enumerate(runs):
        if task not in run.final.tasks:
            continue
        result = run.final.tasks[task]
        _bar(axes, number, result.score, f"{result.score:.2f}")
        if result.headline in result.intervals:
            axes.hlines(number, *result.intervals[result.headline], color="black", linewidth=1.4)
        axes.set_xlabel(METRIC_NAMES.get(result.headline, result.headline))
    axes.set_title(task)
    axes.set_xlim(0, 1.2)


def _bar(axes: Any, number: int, value: float, text: str) -> None:
    axes.barh(number, value, 0.75, color=colour_of(number))
    axes.annotate(text, (value, number), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _dress(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first run on top
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
