"""The sections with curves: scores over the steps, and losses by objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bico_ds.evaluation.report.metric_keys import numbers_of_line
from bico_ds.evaluation.report.page.chart import Chart, Curve, Point, draw, legend
from bico_ds.evaluation.report.page.html import Html, details, element, section, table
from bico_ds.evaluation.report.page.numbers import compact, percent
from bico_ds.evaluation.report.page.scores import figure_of, task_names
from bico_ds.evaluation.report.page.source import LARGEST, ReportedRun, Series
from bico_ds.evaluation.report.wording import WORDINGS, title_of

MOST_POINTS = 200  # of a curve; of more, means are drawn
_MOST_ROWS = 15
_LOSS, _HELD_OUT = "loss/", "held_out/"


def score_curves(runs: Sequence[ReportedRun]) -> Html | None:
    """A panel for each task that was asked at more than one step; None without one."""
    tasks = [name for name in task_names(runs) if any(len(_finite(run, name)) > 1 for run in runs)]
    if not tasks:
        return None
    figures = [_panel(runs, task, number) for number, task in enumerate(tasks)]
    return section(
        "curves",
        "How it was learnt",
        element("p", "Scores at each evaluation; bars at the last one are 95 % intervals.", class_="soft"),
        legend([run.label if any(_finite(run, task) for task in tasks) else "" for run in runs]),
        element("div", *figures, class_="panels"),
    )


def _finite(run: ReportedRun, task: str) -> list[Point]:
    return [(step, score) for step, score in run.compared.curves.get(task, []) if math.isfinite(score)]


def _panel(runs: Sequence[ReportedRun], task: str, number: int) -> Html:
    curves = []
    for index, run in enumerate(runs):
        if points := _finite(run, task):
            final = run.compared.final.tasks.get(task)
            is_same = final is not None and math.isclose(final.score, points[-1][1], abs_tol=1e-6)
            interval = final.interval if final is not None and is_same else None
            curves.append(Curve(index, run.label, points, interval))
    result = next(run.compared.final.tasks[task] for run in runs if task in run.compared.final.tasks)
    is_bleu = result.headline == "bleu"
    wording = WORDINGS.get(task)
    said = (
        f"Persons whose training texts give the {wording.first} first." if wording else "A task of its own."
    )
    chart = Chart(
        identifier=f"score-{number}",
        title=f"{title_of(task)}: score over the steps",
        summary=_summary(curves, lambda score: figure_of(result, score)),
        x_name="optimizer step",
        curves=curves,
        y_format=(lambda value: f"{value:.1f}") if is_bleu else percent,
        y_range=(0.0, 1.0),
    )
    return element(
        "figure",
        element("h3", title_of(task)),
        element("figcaption", said),
        draw(chart),
        _data(f"{title_of(task)}, by step", curves, lambda score: figure_of(result, score)),
    )


def _summary(curves: Sequence[Curve], written: Callable[[float], str]) -> str:
    return " ".join(
        f"{curve.label}: {written(curve.points[0][1])} at step {curve.points[0][0]:,.0f}, "
        f"{written(curve.points[-1][1])} at step {curve.points[-1][0]:,.0f}."
        for curve in curves
    )


def _data(caption: str, curves: Sequence[Curve], written: Callable[[float], str]) -> Html:
    """The values of a chart as a table, of many steps some."""
    steps = sorted({step for curve in curves for step, _ in curve.points})
    every = -(-len(steps) // _MOST_ROWS)
    shown = sorted({*steps[::every], steps[-1]})
    known = [dict(curve.points) for curve in curves]
    rows = [
        (f"{step:,.0f}", *(written(values[step]) if step in values else "–" for values in known))
        for step in shown
    ]
    return details("Data", table(caption, ("step", *(curve.label for curve in curves)), rows))


def losses(runs: Sequence[ReportedRun]) -> Html | None:
    """A panel for the loss of all steps and of each objective, as they were logged; None without one."""
    keys = dict.fromkeys(
        key for run in runs for key in run.logged.series if key.startswith(_LOSS) and key.count("/") == 1
    )
    if not keys:
        return None
    ordered = sorted(keys, key=lambda key: key != "loss/all")
    figures = [_loss_panel(runs, key, number) for number, key in enumerate(ordered)]
    return section(
        "losses",
        "Losses by objective",
        element(
            "p",
            "Mean loss in nats per predicted token. Objectives predict different tokens under different masks: only "
            "curves of one panel stand side by side.",
            class_="soft",
        ),
        legend([run.label if run.logged.series else "" for run in runs]),
        element("div", *figures, class_="panels"),
        _by_source(runs),
    )


def _loss_panel(runs: Sequence[ReportedRun], key: str, number: int) -> Html:
    curves, most = [], 1
    for index, run in enumerate(runs):
        if (series := run.logged.series.get(key)) is not None:
            points, merged = thinned(series)
            curves.append(Curve(index, run.label, points))
            most = max(most, merged)
    name = key.removeprefix(_LOSS)
    title = {"all": "all steps", "divergence": "divergence from the start model"}.get(name, name)
    caption = f"Each point is the mean of {most} logged values." if most > 1 else None
    return _loss_figure(f"loss-{number}", f"Loss, {title}", title, curves, caption=caption)


def _loss_figure(
    identifier: str,
    name: str,
    heading: str,
    curves: Sequence[Curve],
    *,
    caption: str | None = None,
    written: Callable[[float], str] = compact,
) -> Html:
    chart = Chart(
        identifier=identifier,
        title=name,
        summary=_summary(curves, written),
        x_name="optimizer step",
        curves=curves,
    )
    return element(
        "figure",
        element("h3", heading),
        element("figcaption", caption) if caption else None,
        draw(chart),
        _data(f"{name}, by step", curves, written),
    )


def held_out_losses(runs: Sequence[ReportedRun]) -> Html | None:
    """The losses of held-out stores by objective: those at the last evaluation, and a panel for each; None without one."""
    found = [_held_out(run) for run in runs]
    keys = list(dict.fromkeys(key for losses in found for key in losses))
    if not keys:
        return None
    figures = []
    for number, key in enumerate(keys):
        curves = [
            Curve(index, run.label, points)
            for index, (run, losses) in enumerate(zip(runs, found, strict=True))
            if len(points := losses.get(key, [])) > 1
        ]
        if curves:
            store, _, objective = key.rpartition("/")
            heading = f"{objective}, on {store}"
            figures.append(
                _loss_figure(
                    f"held-out-{number}", f"Held-out loss, {heading}", heading, curves, written=_digits
                )
            )
    rows = [(key, *(_digits(x[key][-1][1]) if key in x else "–" for x in found)) for key in keys]
    return section(
        "held-out",
        "Held-out losses",
        element(
            "p",
            "Mean loss in nats per predicted token of texts that are not trained on, by the same masks at every evaluation: "
            "where it rises while the training loss falls, the model learns its texts by heart.",
            class_="soft",
        ),
        legend([run.label if losses else "" for run, losses in zip(runs, found, strict=True)])
        if figures
        else None,
        element("div", *figures, class_="panels") if figures else None,
        table("Held-out loss at the last evaluation", ("store/objective", *(r.label for r in runs)), rows),
    )


def _digits(loss: float) -> str:
    """Of a mean over thousands of targets more digits count than of one step's."""
    return f"{loss:.4f}"


def _held_out(run: ReportedRun) -> dict[str, list[Point]]:
    """Steps and losses, by `STORE/OBJECTIVE`, in the order of steps; a result file has one loss, of no step."""
    by_step: dict[str, dict[float, float]] = {}
    for record in run.logged.of_kind("evaluation"):
        for metric, loss in numbers_of_line(record).items():
            by_step.setdefault(metric, {})[float(record["step"])] = loss
    if run.folder is None:
        by_step = {metric: {0.0: loss} for metric, loss in run.compared.numbers.items()}
    shown = {
        metric.removeprefix(_HELD_OUT): sorted(
            (step, loss) for step, loss in losses.items() if abs(loss) < LARGEST
        )
        for metric, losses in by_step.items()
        if metric.startswith(_HELD_OUT)
    }
    return {key: points for key, points in shown.items() if points}


def thinned(series: Series) -> tuple[list[Point], int]:
    """At most `MOST_POINTS` points in the order of steps, and of how many logged values each is the mean.

    Of a step that was logged twice the last value counts, as after a resume.
    """
    values = dict(zip(series.steps, series.values, strict=True))
    steps = sorted(values)
    merged = -(-len(steps) // MOST_POINTS)
    parts = [steps[start : start + merged] for start in range(0, len(steps), merged)]
    return [(float(part[-1]), float(np.mean([values[step] for step in part]))) for part in parts], merged


def _by_source(runs: Sequence[ReportedRun]) -> Html | None:
    """The last losses by objective and source, where an objective has several sources."""
    keys = sorted(
        {key for run in runs for key in run.logged.series if key.startswith(_LOSS) and key.count("/") > 1}
    )
    if not keys:
        return None
    rows = [(key.removeprefix(_LOSS), *_last(runs, key)) for key in keys]
    return table(
        "Last logged loss by objective and source", ("objective/source", *(r.label for r in runs)), rows
    )


def _last(runs: Sequence[ReportedRun], key: str) -> Iterator[str]:
    for run in runs:
        series = run.logged.series.get(key)
        yield "–" if series is None else compact(series.values[-1])
