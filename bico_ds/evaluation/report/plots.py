"""The learning curves of a comparison, one panel per task, and what all its pictures have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bico_ds.evaluation.report.runs import ComparedRun
from bico_ds.evaluation.report.wording import is_reverse, metric_name, pairs_and_others, title_of
from bico_ds.evaluation.results import TaskResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")

# Okabe and Ito's colours, which colour-blind people tell apart. One more marker than colours: the first 56 runs differ.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_RUNS_PER_LINE = 5  # of a legend, at most
_LETTER, _HANDLE = 0.1, 0.6  # inches of a legend's line
_COLUMNS = ("Forward: asked as trained", "Reverse: asked the other way round")
_MOST_LINES = 4  # of two panels each
_LEFT, _RIGHT, _PANEL, _ABOVE, _FOOT, _LEGEND_LINE = 1.2, 0.15, 2.15, 1.0, 0.7, 0.245  # inches


def plot_curves(
    runs: Sequence[ComparedRun], to: Path | BinaryIO, *, dpi: int = 150, format: str = "png", bands: str = ""
) -> None:
    """Write a picture of the runs' curves, at least one: headline scores over the steps, one colour per run.

    The two directions of one set of questions stand side by side. Of more than eight tasks those with a reverse one come
    first, and the others have no panel. `to`: a path or an open file. `bands`: in words what the bands of the runs are,
    which are drawn then; without it they are drawn where there is one run.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(name for run in runs for name in run.curves))
    lines, are_pairs = _panel_lines(tasks)
    width = 10.0
    columns = legend_columns([run.label for run in runs], width)
    below = _FOOT + _LEGEND_LINE * -(-len(runs) // columns)
    height = _ABOVE + (_PANEL + 0.75) * len(lines) - 0.75 + below
    figure = Figure(figsize=(width, height))
    # Room that is known takes half the time of a layout that measures all texts: training waits for these pictures.
    figure.subplots_adjust(
        _LEFT / width,
        below / height,
        1 - _RIGHT / width,
        1 - _ABOVE / height,
        wspace=0.2,
        hspace=0.75 / _PANEL,
    )
    panels = figure.subplots(len(lines), 2, sharex=True, sharey=True, squeeze=False)
    for row, (heading, *names) in zip(panels, lines, strict=True):
        if heading:
            row[0].annotate(
                heading, (-0.24, 0.5), xycoords="axes fraction", va="center", rotation=90, fontsize=12
            )
        for axes, name in zip(row, names, strict=True):
            _panel(axes, runs, name, with_bands=bool(bands) or len(runs) == 1, is_marked=not are_pairs)
    for axes, heading in zip(panels[0], _COLUMNS if are_pairs else (), strict=False):
        axes.annotate(heading, (0.5, 1.16), xycoords="axes fraction", ha="center", fontsize=13, weight="bold")
    for axes in panels[-1]:
        axes.set_xlabel("optimizer step")
    figure.suptitle(_curves_title(tasks, lines, are_pairs, bands), y=1 - 0.08 / height, va="top", fontsize=11)
    handles = [line_of(number, label=run.label) for number, run in enumerate(runs)]
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=12)
    save(figure, to, dpi=dpi, format=format)


def _panel_lines(tasks: Sequence[str]) -> tuple[list[tuple[str, str, str]], bool]:
    """Each line of panels: what its tasks have in common, and two tasks, empty for none; whether all are pairs."""
    pairs, others = pairs_and_others(tasks)
    lines = [(pair.title, pair.forward, pair.reverse) for pair in pairs]
    lines += [("", *pair) for pair in zip(others[::2], [*others[1::2], ""], strict=False)]
    lines.sort(key=lambda line: not any(is_reverse(name) and name in tasks for name in line[1:]))
    are_pairs = not others and all(is_reverse(pair.reverse) for pair in pairs)
    return lines[:_MOST_LINES], are_pairs


def _curves_title(
    tasks: Sequence[str], lines: Sequence[tuple[str, str, str]], are_pairs: bool, bands: str
) -> str:
    drawn = sum(name in tasks for _, *names in lines for name in names)
    some = f" ({drawn} of {len(tasks)} tasks)" if drawn < len(tasks) else ""
    notes = [] if are_pairs else ["bold: asked the other way round"]
    notes += [f"bands: {bands}"] if bands else []
    return f"Headline scores over the steps{some}\n{'; '.join(notes)}".strip()


def _panel(axes: Any, runs: Sequence[ComparedRun], task: str, *, with_bands: bool, is_marked: bool) -> None:
    if not any(task in run.curves for run in runs):
        axes.set_axis_off()
        return
    for number, run in enumerate(runs):
        _draw(axes, run, task, number, of=len(runs), with_band=with_bands)
    _dress(axes, runs, task, weight="bold" if is_marked and is_reverse(task) else "normal")


def _draw(axes: Any, run: ComparedRun, task: str, number: int, *, of: int, with_band: bool = False) -> None:
    if not run.curves.get(task):
        return
    steps, scores = zip(*run.curves[task], strict=True)
    scale = 1 + (of - 1 - number) / max(2, of - 1)  # the first runs show below the later ones
    line = line_of(number, scale=scale)
    line.set_data(steps, scores)
    line.set_clip_on(False)
    axes.add_line(line)
    if with_band and len(run.bands.get(task, [])) > 1:
        axes.fill_between(
            *zip(*run.bands[task], strict=True), color=line.get_color(), alpha=0.15, linewidth=0
        )
    axes.autoscale_view()


def _dress(axes: Any, runs: Sequence[ComparedRun], task: str, *, weight: str) -> None:
    results = [run.final.tasks[task] for run in runs if task in run.final.tasks]
    axes.set_title(title_of(task), fontsize=11, weight=weight)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True, labelleft=True)
    if not results:
        return
    axes.set_ylabel(metric_name(results[0].headline))
    floor = floor_of(results)
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


def floor_of(results: Sequence[TaskResult]) -> float | None:
    """The floor of a task's headline metric; None where it is not known, or is the axis itself."""
    floors = (result.floors.get(result.headline, 0.0) for result in results)
    return next((floor for floor in floors if floor > 0.005), None)


def colour_of(number: int) -> str:
    """The colour of a comparison's run in every picture; `number` counts the runs from 0."""
    return _COLOURS[number % len(_COLOURS)]


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many labels stand side by side below a picture that is so many inches wide."""
    fit = int(width / (_HANDLE + _LETTER * max(map(len, labels))))
    return max(1, min(len(labels), _RUNS_PER_LINE, fit))


def line_of(number: int, *, scale: float = 1.0, label: str = "") -> Any:
    """The line and marker of a comparison's run; `scale`: of their sizes."""
    from matplotlib.lines import Line2D

    colour, marker = colour_of(number), _MARKERS[number % len(_MARKERS)]
    return Line2D([], [], color=colour, marker=marker, linewidth=2 * scale, markersize=5 * scale, label=label)


def save(figure: Figure, to: Path | BinaryIO, *, dpi: int = 150, format: str | None = None) -> None:
    """Write a figure in a format of `FORMATS`, by default that of the path's name; equal figures give equal files."""
    import matplotlib

    format = format or Path(str(to)).suffix[1:]
    dated = {"pdf": "CreationDate", "svg": "Date"}.get(format)
    with matplotlib.rc_context({"svg.hashsalt": "bico_ds"}):
        figure.savefig(to, format=format, dpi=dpi, metadata={dated: None} if dated else None)
