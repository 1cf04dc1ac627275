"""Learning curves as a picture, one panel per task, forward on the left, reverse on the right; final scores as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bico_ds.evaluation.report.runs import Arm
from bico_ds.evaluation.results import TaskResult

# Okabe and Ito's colours, told apart by colour-blind people too; the markers say the same again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PANELS = (
    ("n2d", "N2D: name → description"),
    ("n2d_reverse", "N2D-reverse: description → name"),
    ("d2n", "D2N: description → name"),
    ("d2n_reverse", "D2N-reverse: name → description"),
)
_COLUMNS = ("Forward: asked as trained", "Reverse: asked the other way round")
_ROWS = ("trained name first", "trained description first")
_METRICS = {"contains": "accuracy (contains)", "prefix": "accuracy (prefix)", "bleu": "word BLEU"}


def plot_curves(arms: Sequence[Arm], path: Path) -> None:
    """Write a PNG of the headline scores of the four tasks over the steps, one colour per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    for axes, (task, title) in zip(panels, _PANELS, strict=True):
        for number, arm in enumerate(arms):
            _draw(axes, arm, task, number, of=len(arms))
        _dress(axes, arms, task, title)
    for axes, heading in zip(panels[:2], _COLUMNS, strict=True):
        axes.annotate(heading, (0.5, 1.16), xycoords="axes fraction", ha="center", fontsize=13, weight="bold")
    for axes, trained in zip(panels[::2], _ROWS, strict=True):
        axes.annotate(trained, (-0.24, 0.5), xycoords="axes fraction", va="center", rotation=90, fontsize=12)
    for axes in panels[2:]:
        axes.set_xlabel("optimizer step")
    handles = [_line(number, label=arm.label) for number, arm in enumerate(arms)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(arms), frameon=False, fontsize=12)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, arm: Arm, task: str, number: int, *, of: int) -> None:
    if task not in arm.curves:
        return
    steps, scores = zip(*arm.curves[task], strict=True)
    line = _line(number, scale=1 + 0.5 * (of - 1 - number))  # the first arms show below the later ones
    line.set_data(steps, scores)
    line.set_clip_on(False)
    axes.add_line(line)
    axes.autoscale_view()


def _dress(axes: Any, arms: Sequence[Arm], task: str, title: str) -> None:
    results = [arm.final.tasks[task] for arm in arms if task in arm.final.tasks]
    axes.set_title(title, fontsize=11)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True, labelleft=True)
    if not results:
        return
    metric = results[0].headline
    axes.set_ylabel(_METRICS.get(metric, metric))
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


def _line(number: int, *, scale: float = 1.0, label: str = "") -> Any:
    from matplotlib.lines import Line2D

    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    return Line2D([], [], color=colour, marker=marker, linewidth=2 * scale, markersize=5 * scale, label=label)


def plot_scores(arms: Sequence[Arm], path: Path) -> None:
    """Write a PNG of the final headline scores as bars, with 95 % intervals and floors, one colour per arm."""
    from matplotlib.figure import Figure

    headlines = {name: task.headline for arm in arms for name, task in arm.final.tasks.items()}
    figure = Figure(figsize=(max(5.0, 1.2 + 2.0 * len(headlines)), 4.4), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(arms):
        _bars(axes, arm, list(headlines), number, of=len(arms))
    floors = [
        _floor([arm.final.tasks[name] for arm in arms if name in arm.final.tasks]) for name in headlines
    ]
    for place, floor in enumerate(floors):
        if floor is not None:
            axes.hlines(floor, place - 0.45, place + 0.45, color="#555555", linestyle=":", linewidth=1.5)
    axes.set_xticks(range(len(headlines)), [f"{name}\n{_METRICS.get(m, m)}" for name, m in headlines.items()])
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("score" if not any(floors) else "score (dotted: another person's answer)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(arms), frameon=False)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, arm: Arm, names: Sequence[str], number: int, *, of: int) -> None:
    width = 0.8 / of
    present = [(place, arm.final.tasks[name]) for place, name in enumerate(names) if name in arm.final.tasks]
    places = [place + (number - (of - 1) / 2) * width for place, _ in present]
    scores = [task.score for _, task in present]
    axes.bar(places, scores, width * 0.92, color=_COLOURS[number % len(_COLOURS)], label=arm.label)
    for x, score, (_, task) in zip(places, scores, present, strict=True):
        low, high = task.intervals.get(task.headline, (score, score))
        axes.vlines(x, low, high, color="black", linewidth=1.4)
        axes.annotate(
            f"{score:.2f}", (x, high), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8
        )
