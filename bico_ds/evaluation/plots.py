"""Learning curves as a picture: a panel a task, forward on the left, reverse on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bico_ds.evaluation.arms import Arm

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
_METRICS = {"contains": "accuracy (contains)", "bleu": "word BLEU"}


def plot_curves(arms: Sequence[Arm], path: Path) -> None:
    """Write a PNG of the headline scores of the four tasks over the steps, one colour an arm."""
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
    floor = next((result.floors[metric] for result in results if metric in result.floors), None)
    if floor is not None and floor > 0.005:  # a floor of nothing is the axis itself
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


def _line(number: int, *, scale: float = 1.0, label: str = "") -> Any:
    from matplotlib.lines import Line2D

    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    return Line2D([], [], color=colour, marker=marker, linewidth=2 * scale, markersize=5 * scale, label=label)
