"""One picture of many runs: a bar for every run, in a panel for every task and for every measure of the runs' work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bico_ds.evaluation.report.plots import colour_of, save
from bico_ds.evaluation.report.runs import ComparedRun
from bico_ds.evaluation.report.wording import metric_name, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS_PER_LINE = 4
_WORK = {
    "updates": "updates",
    "rows": "tokens through the model",
    "flops": "FLOPs",
    "seconds": "seconds of training steps",
}


class _Bar(NamedTuple):
    """Of the run with this number; `interval`: of the value, where it is known."""

    number: int
    value: float
    text: str
    interval: tuple[float, float] | None = None


def plot_overview(runs: Sequence[ComparedRun], path: Path) -> None:
    """Write `overview` in the format of the path's name: PNG, PDF or SVG."""
    save(overview(runs), path)


def overview(runs: Sequence[ComparedRun]) -> Figure:
    """The final headline scores of each task with their 95 % intervals, then the work of the runs, where it is known.

    Runs go from top to bottom in the given order; one without a task, or of unknown work, has no bar there.
    """
    from matplotlib.figure import Figure

    headlines = {name: task.headline for run in runs for name, task in run.final.tasks.items()}
    panels = {
        f"{title_of(task)}\n{metric_name(metric)}": _scores(runs, task) for task, metric in headlines.items()
    }
    panels |= {title: bars for key, title in _WORK.items() if (bars := _amounts(runs, key))}
    lines = -(-len(panels) // _PANELS_PER_LINE)
    figure = Figure(figsize=(12, lines * (1.0 + 0.3 * len(runs))), layout="constrained")
    grid = figure.subplots(lines, _PANELS_PER_LINE, sharey=True, squeeze=False).ravel()
    for axes, (title, bars) in zip(grid, panels.items(), strict=False):
        axes.set_title(title, fontsize=11)
        _draw(axes, bars)
        _dress(axes, [run.label for run in runs])
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _scores(runs: Sequence[ComparedRun], task: str) -> list[_Bar]:
    results = {number: run.final.tasks[task] for number, run in enumerate(runs) if task in run.final.tasks}
    return [
        _Bar(number, result.score, f"{result.score:.2f}", result.interval)
        for number, result in results.items()
    ]


def _amounts(runs: Sequence[ComparedRun], key: str) -> list[_Bar]:
    """What the runs did of one field of their `Work`; empty where that is known of none."""
    amounts = {number: getattr(run.work, key) for number, run in enumerate(runs) if run.work is not None}
    return [
        _Bar(number, amount, f"{amount:,.0f}" if amount < 1e7 else f"{amount:.3g}")
        for number, amount in amounts.items()
        if amount is not None
    ]


def _draw(axes: Any, bars: Sequence[_Bar]) -> None:
    for bar in bars:
        axes.barh(bar.number, bar.value, 0.75, color=colour_of(bar.number))
        end = bar.value
        if bar.interval is not None:
            axes.hlines(bar.number, *bar.interval, color="black", linewidth=1.4)
            end = max(end, bar.interval[1])
        axes.annotate(
            bar.text, (end, bar.number), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.margins(x=0.3)  # room for the texts
    axes.set_xlim(left=0)


def _dress(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first run on top
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
