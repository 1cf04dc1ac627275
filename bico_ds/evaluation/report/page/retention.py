"""The section of what is left of the model's other language: perplexities, and their frontier with a score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bico_ds.evaluation.report.frontier import HEADERS, Panel, Point, frontier_lines, panels
from bico_ds.evaluation.report.page.chart import Chart, Curve, draw, legend
from bico_ds.evaluation.report.page.html import Html, details, element, section, table
from bico_ds.evaluation.report.page.numbers import compact, percent
from bico_ds.evaluation.report.page.source import ReportedRun
from bico_ds.evaluation.report.wording import title_of

_MOST_NAMED, _MOST_NAMES = 3, 8  # series whose points have their names beside them, and points of one


def retention(runs: Sequence[ReportedRun]) -> Html | None:
    """Perplexities of texts that were not trained on, and a chart for each; None where none is known."""
    rows = list(_perplexities(runs))
    if not rows:
        return None
    found = panels([run.compared for run in runs])
    labels = list(dict.fromkeys(series.label for panel in found for series in panel.series))
    drawn = (_figure(panel, labels, number, runs) for number, panel in enumerate(found))
    figures = [figure for figure in drawn if figure is not None]
    headers = ("text", "model", "step", "perplexity", "the base's", "times the base's")
    return section(
        "retention",
        "What is left of the other language",
        element(
            "p",
            "How well the model still predicts texts that it was not trained on: the lower its perplexity, the better.",
            class_="soft",
        ),
        legend(labels) if figures else None,
        element("div", *figures, class_="panels") if figures else None,
        table("Perplexity at the last evaluation", headers, rows, words=("model",)),
    )


def _perplexities(runs: Sequence[ReportedRun]) -> Iterator[list[str]]:
    for text in dict.fromkeys(name for run in runs for name in run.compared.texts):
        for run in runs:
            figures = run.compared.texts.get(text, {})
            if figures:
                step, figure = list(figures.items())[-1]
                base = figure.base
                yield [
                    text,
                    run.label,
                    "–" if step is None else f"{step:,}",
                    compact(figure.perplexity),
                    compact(base) if base else "–",
                    f"{figure.perplexity / base:.2f}" if base else "–",
                ]


def _has_place(point: Point) -> bool:
    """Whether a logarithmic axis of perplexities, and one of scores, have a place for it."""
    return point.perplexity > 0 and math.isfinite(point.score)


def _figure(panel: Panel, labels: Sequence[str], number: int, runs: Sequence[ReportedRun]) -> Html | None:
    asked = (run for run in runs if panel.task in run.compared.final.tasks)
    intervals = {run.label: run.compared.final.tasks[panel.task].interval for run in asked}
    curves = []
    for series in panel.series:
        shown = [point for point in series.points if _has_place(point)]
        has_names = len(panel.series) <= _MOST_NAMED and len(shown) <= _MOST_NAMES
        if shown:
            points = [(point.perplexity, point.score) for point in shown]
            names = [point.name for point in shown] if has_names else []
            known = shown[-1].interval
            interval = intervals.get(series.label, known) if known is not None else None
            curves.append(Curve(labels.index(series.label), series.label, points, interval, names))
    if not curves:
        return None
    is_bleu = panel.metric == "bleu"
    chart = Chart(
        identifier=f"frontier-{number}",
        title=f"{title_of(panel.task)}: score over the perplexity of {panel.text}",
        summary=" ".join(
            f"{curve.label} ends at perplexity {compact(curve.points[-1][0])} with {curve.points[-1][1]:.3f}."
            for curve in curves
        ),
        x_name=f"perplexity of {panel.text} (dotted: the base's)",
        curves=curves,
        y_format=(lambda value: f"{value:.1f}") if is_bleu else percent,
        y_range=(0.0, 1.0),
        is_log_x=True,
        reference=[base for base in panel.bases if 0 < base < math.inf],
        best=[(point.perplexity, point.score) for point in panel.frontier if _has_place(point)],
    )
    return element(
        "figure",
        element("h3", f"{title_of(panel.task)}, beside {panel.text}"),
        element(
            "figcaption",
            "Up and to the left is better. Broad grey: the best points. Numbers: steps or shares.",
        ),
        draw(chart),
        details(
            "Data",
            table(
                f"Score and perplexity of {panel.text}",
                HEADERS,
                frontier_lines(panel),
                words=("on the frontier",),
            ),
        ),
    )
