"""Scores as the report says and draws them: in per cent or as BLEU, with intervals, and what was asked in words."""

from __future__ import annotations

from collections.abc import Sequence

from bico_ds.evaluation.report.page.chart import look
from bico_ds.evaluation.report.page.html import Html, element, joined
from bico_ds.evaluation.report.page.numbers import percent, percent_range
from bico_ds.evaluation.report.page.source import ReportedRun
from bico_ds.evaluation.report.wording import WORDINGS
from bico_ds.evaluation.results import TaskResult

METRICS = {
    "contains": "accuracy: the answer is in what the model writes",
    "prefix": "accuracy: what the model writes begins with the answer",
    "exact": "accuracy: the model writes the answer and nothing else",
    "bleu": "word BLEU: how many words and word orders of the answer the model writes",
}


def task_names(runs: Sequence[ReportedRun]) -> list[str]:
    """All tasks of the runs: those that this report has words for in their order, then others in that of the runs."""
    asked = dict.fromkeys(name for run in runs for name in run.compared.final.tasks)
    return [*(name for name in WORDINGS if name in asked), *(name for name in asked if name not in WORDINGS)]


def figure_of(task: TaskResult, score: float | None = None) -> str:
    """The headline score, or another one of the same metric, as a reader takes it."""
    value = task.score if score is None else score
    return f"{value:.3f}" if task.headline == "bleu" else percent(value)


def range_of(task: TaskResult) -> str:
    """The interval as `92 to 100`; empty where it is not known."""
    found = task.interval
    if found is None:
        return ""
    return f"{found[0]:.2f} to {found[1]:.2f}" if task.headline == "bleu" else percent_range(*found)


def cell(task: TaskResult | None, number: int) -> Html | str:
    """A score in a table: the figure, its interval, and both as a bar in the colour of the run with this number."""
    if task is None:
        return "–"
    interval = element("span", f"{range_of(task)}", class_="interval") if range_of(task) else None
    return element("div", joined((figure_of(task), interval, bar(task, number))), class_="score")


def bar(task: TaskResult, number: int) -> Html:
    """A bar as long as the score, with the interval over it; what it says stands beside it in figures."""
    parts = [
        element("rect", x=0, y=3, width=200, height=8, rx=4, class_="bar-back"),
        element(
            "rect", x=0, y=3, width=f"{200 * min(max(task.score, 0), 1):.1f}", height=8, rx=4, class_="dot"
        ),
    ]
    if (found := task.interval) is not None:
        low, high = (f"{200 * min(max(end, 0), 1):.1f}" for end in found)
        parts.append(element("path", d=f"M{low} 0V14M{low} 7H{high}M{high} 0V14", class_="interval-mark"))
    return element("svg", *parts, viewBox="-1 0 202 14", class_=look(number), aria_hidden="true")
