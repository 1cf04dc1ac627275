"""The pictures of a comparison: learning curves, one panel per task, final scores as bars, and the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from bico_ds.evaluation.report.frontier import Panel, Point
from bico_ds.evaluation.report.runs import ComparedRun
from bico_ds.evaluation.results import TaskResult

# Okabe and Ito's colours, which colour-blind people tell apart. One more marker than colours: the first 56 runs differ.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_RUNS_PER_LINE = 5  # of a legend
_PANELS = (
    ("n2d", "N2D: name → description"),
    ("n2d_reverse", "N2D-reverse: description → name"),
    ("d2n", "D2N: description → name"),
    ("d2n_reverse", "D2N-reverse: name → description"),
)
_COLUMNS = ("Forward: asked as trained", "Reverse: asked the other way round")
_ROWS = ("trained name first", "trained description first")
METRIC_NAMES = {"contains": "accuracy (contains)", "prefix": "accuracy (prefix)", "bleu": "word BLEU"}


def plot_curves(runs: Sequence[ComparedRun], to: Path | BinaryIO, *, dpi: int = 150) -> None:
    """Write a PNG of the headline scores of the four tasks over the steps, one colour per run, to a path or an open file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7))
    panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    columns = min(len(runs), _RUNS_PER_LINE)
    lines = -(-len(runs) // columns)
    # Room that is known takes half the time of a layout that measures all texts: training waits for these pictures.
    figure.subplots_adjust(0.12, 0.1 + 0.035 * lines, 0.985, 0.895, wspace=0.2, hspace=0.3)
    for axes, (task, title) in zip(panels, _PANELS, strict=True):
        for number, run in enumerate(runs):
            _draw(axes, run, task, number, of=len(runs))
        _dress(axes, runs, task, title)
    for axes, heading in zip(panels[:2], _COLUMNS, strict=True):
        axes.annotate(heading, (0.5, 1.16), xycoords="axes fraction", ha="center", fontsize=13, weight="bold")
    for axes, trained in zip(panels[::2], _ROWS, strict=True):
        axes.annotate(trained, (-0.24, 0.5), xycoords="axes fraction", va="center", rotation=90, fontsize=12)
    for axes in panels[2:]:
        axes.set_xlabel("optimizer step")
    handles = [_line(number, label=run.label) for number, run in enumerate(runs)]
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=12)
    figure.savefig(to, format="png", dpi=dpi)


def _draw(axes: Any, run: ComparedRun, task: str, number: int, *, of: int) -> None:
    if task not in run.curves:
        return
    steps, scores = zip(*run.curves[task], strict=True)
    scale = 1 + (of - 1 - number) / max(2, of - 1)  # the first runs show below the later ones
    line = _line(number, scale=scale)
    line.set_data(steps, scores)
    line.set_clip_on(False)
    axes.add_line(line)
    if of == 1 and len(run.bands.get(task, [])) > 1:  # those of several runs would hide each other
        axes.fill_between(
            *zip(*run.bands[task], strict=True), color=line.get_color(), alpha=0.15, linewidth=0
        )
    axes.autoscale_view()


def _dress(axes: Any, runs: Sequence[ComparedRun], task: str, title: str) -> None:
    results = [run.final.tasks[task] for run in runs if task in run.final.tasks]
    axes.set_title(title, fontsize=11)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True, labelleft=True)
    if not results:
        return
    metric = results[0].headline
    axes.set_ylabel(METRIC_NAMES.get(metric, metric))
    floor = _floor(results)
    if floor is not None:
        axes.axhline(floor, color="#777777", linestyle=":", linewidth=1.2)
        axes.annotate(
            "floor: another person's answer",
            (0.99, floor),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#555555",
        )


def _floor(results: Sequence[TaskResult]) -> float | None:
    """The floor of a task's headline metric; None where it is not known, or is the axis itself."""
    floors = (result.floors.get(result.headline, 0.0) for result in results)
    return next((floor for floor in floors if floor > 0.005), None)


def colour_of(number: int) -> str:
    """The colour of a comparison's run in every picture; `number` counts the runs from 0."""
    return _COLOURS[number % len(_COLOURS)]


def _line(number: int, *, scale: float = 1.0, label: str = "") -> Any:
    from matplotlib.lines import Line2D

    colour, marker = colour_of(number), _MARKERS[number % len(_MARKERS)]
    return Line2D([], [], color=colour, marker=marker, linewidth=2 * scale, markersize=5 * scale, label=label)


def plot_scores(runs: Sequence[ComparedRun], path: Path) -> None:
    """Write a PNG of the final headline scores as bars, with 95 % intervals and floors, one colour per run."""
    from matplotlib.figure import Figure

    headlines = {name: task.headline for run in runs for name, task in run.final.tasks.items()}
    width = max(2.0, 0.4 * len(runs)) * len(headlines)
    figure = Figure(figsize=(max(5.0, 1.2 + width), 4.4), layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(runs):
        _bars(axes, run, list(headlines), number, of=len(runs))
    floors = [
        _floor([run.final.tasks[name] for run in runs if name in run.final.tasks]) for name in headlines
    ]
    for index, floor in enumerate(floors):
        if floor is not None:
            axes.hlines(floor, index - 0.45, index + 0.45, color="#555555", linestyle=":", linewidth=1.5)
    axes.set_xticks(
        range(len(headlines)), [f"{name}\n{METRIC_NAMES.get(m, m)}" for name, m in headlines.items()]
    )
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("score" if not any(floors) else "score (dotted: another person's answer)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(runs), _RUNS_PER_LINE), frameon=False)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, run: ComparedRun, names: Sequence[str], number: int, *, of: int) -> None:
    width = 0.8 / of
    present = [(index, run.final.tasks[name]) for index, name in enumerate(names) if name in run.final.tasks]
    centres = [index + (number - (of - 1) / 2) * width for index, _ in present]
    scores = [task.score for _, task in present]
    axes.bar(centres, scores, width * 0.92, color=colour_of(number), label=run.label)
    for x, score, (_, task) in zip(centres, scores, present, strict=True):
        low, high = task.interval or (score, score)
        axes.vlines(x, low, high, color="black", linewidth=1.4)
        axes.annotate(
            f"{score:.2f}", (x, high), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8
        )


def plot_frontier(panels: Sequence[Panel], path: Path) -> None:
    """Write a PNG of the score over the perplexity of each text: a colour per series, the best points joined in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, 5.6 * len(panels)), 5.2), layout="constrained")
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for series in panel.series:
            _draw_series(axes, series.points, labels.index(series.label))
        _dress_frontier(axes, panel)
    handles = [_line(number, label=label) for number, label in enumerate(labels)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    figure.savefig(path, dpi=150)


def _draw_series(axes: Any, points: Sequence[Point], number: int) -> None:
    """The last point of a run, and every point with an interval, is large: the others lead there."""
    line = _line(number, scale=0.6)
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
    axes.set_ylabel(f"{panel.task}: {METRIC_NAMES.get(panel.metric, panel.metric)}")
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
