"""The pictures of final scores: as bars, and beside the perplexity of other texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bico_ds.evaluation.report.frontier import Panel, Point
from bico_ds.evaluation.report.plots import colour_of, floor_of, legend_columns, line_of, save
from bico_ds.evaluation.report.runs import ComparedRun
from bico_ds.evaluation.report.wording import metric_name, title_of


def plot_scores(
    runs: Sequence[ComparedRun], path: Path, *, single: Sequence[Mapping[str, Sequence[float]]] = ()
) -> None:
    """Write a picture of the final headline scores as bars, with 95 % intervals and floors, one colour per run.

    `single`: of each run the scores by task whose means it has, which are drawn as dots.
    """
    from matplotlib.figure import Figure

    headlines = {name: task.headline for run in runs for name, task in run.final.tasks.items()}
    width = max(2.0, 0.4 * len(runs)) * len(headlines)
    figure = Figure(figsize=(max(5.0, 1.2 + width), 4.4), layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(runs):
        _bars(axes, run, list(headlines), number, of=len(runs), single=single[number] if single else {})
    floors = [
        floor_of([run.final.tasks[name] for run in runs if name in run.final.tasks]) for name in headlines
    ]
    for index, floor in enumerate(floors):
        if floor is not None:
            axes.hlines(floor, index - 0.45, index + 0.45, color="#555555", linestyle=":", linewidth=1.5)
    axes.set_xticks(range(len(headlines)), [_tick(name, metric) for name, metric in headlines.items()])
    axes.set_ylim(0, 1.08)
    axes.set_title(
        "Final scores, with 95 % intervals" + ("; dots: single runs" if single else ""), fontsize=11
    )
    axes.set_ylabel("score" if not any(floors) else "score (dotted: another person's answer)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    columns = legend_columns([run.label for run in runs], figure.get_figwidth())
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    save(figure, path)


def _tick(task: str, metric: str) -> str:
    return f"{title_of(task).replace(': ', ':' + chr(10))}\n{metric_name(metric)}"


def _bars(
    axes: Any,
    run: ComparedRun,
    names: Sequence[str],
    number: int,
    *,
    of: int,
    single: Mapping[str, Sequence[float]],
) -> None:
    width = 0.8 / of
    present = [(index, name) for index, name in enumerate(names) if name in run.final.tasks]
    centres = [index + (number - (of - 1) / 2) * width for index, _ in present]
    scores = [run.final.tasks[name].score for _, name in present]
    axes.bar(centres, scores, width * 0.92, color=colour_of(number), label=run.label)
    for x, score, (_, name) in zip(centres, scores, present, strict=True):
        low, high = run.final.tasks[name].interval or (score, score)
        axes.vlines(x, low, high, color="black", linewidth=1.4)
        dots = single.get(name, ())
        beside = [x + width * ((index + 0.5) / len(dots) - 0.5) * 0.6 for index in range(len(dots))]
        axes.plot(beside, dots, "o", color="white", markeredgecolor="black", markersize=4, zorder=3)
        top = max(high, *dots) if dots else high
        axes.annotate(
            f"{score:.2f}", (x, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8
        )


def plot_frontier(panels: Sequence[Panel], path: Path) -> None:
    """Write a picture of the score over the perplexity of each text: a colour per series, the best points joined in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, 5.6 * len(panels)), 5.2), layout="constrained")
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for series in panel.series:
            _draw_series(axes, series.points, labels.index(series.label))
        _dress_frontier(axes, panel)
    handles = [line_of(number, label=label) for number, label in enumerate(labels)]
    columns = legend_columns(labels, figure.get_figwidth())
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle("Score beside the perplexity of other texts (grey: the frontier)", fontsize=11)
    save(figure, path)


def _draw_series(axes: Any, points: Sequence[Point], number: int) -> None:
    """The last point of a run, and every point with an interval, is large: the others lead there."""
    line = line_of(number, scale=0.6)
    line.set_data([point.perplexity for point in points], [point.score for point in points])
    axes.add_line(line)
    colour, marker = line.get_color(), line.get_marker()
    for point in points:
        if point is points[-1] or point.interval is not None:
            axes.plot(point.perplexity, point.score, marker=marker, color=colour, markersize=8, zorder=3)
        if point.interval is not None:
            axes.vlines(point.perplexity, *point.interval, color=colour, linewidth=1.2)
        axes.annotate(
            point.name,
            (point.perplexity, point.score),
            xytext=(5, -9),
            textcoords="offset points",
            fontsize=7,
            color="#555555",
        )


def _dress_frontier(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogFormatter

    best = panel.frontier
    axes.plot(
        [point.perplexity for point in best],
        [point.score for point in best],
        color="#999999",
        linewidth=6,
        alpha=0.35,
        zorder=0,
    )
    for base in panel.bases:
        axes.axvline(base, color="#555555", linestyle=":", linewidth=1.5)
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlabel(f"perplexity of {panel.text} (dotted: the base's)")
    axes.set_ylabel(f"{title_of(panel.task)}\n{metric_name(panel.metric)}")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    if len(panel.bases) == 1:
        base = panel.bases[0]
        times = axes.secondary_xaxis("top", functions=(lambda x: x / base, lambda x: x * base))
        times.set_xlabel("times the base's")
        times.xaxis.set_major_formatter("{x:g}")
        times.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
