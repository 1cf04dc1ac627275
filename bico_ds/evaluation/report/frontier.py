"""The frontier: how much is answered in reverse, beside how much of the other language is left.

A point is a model: a run at one of its evaluations, an export, or a blend of one with its base. Its place is the perplexity
of a text that was not trained on, and the score of a task. No point of the frontier has another one that is at least as
good in both and better in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.evaluation.report.runs import ComparedRun

TASK = "n2d_reverse"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model. `name`: the step, or the share of the fine-tuned weights in a blend; empty for a model by itself.

    `perplexity`: of the panel's text; `base`: that of the base, where it is known. `interval`: of `score`, 95 %.
    """

    name: str
    perplexity: float
    base: float | None
    score: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """Models that a line joins: a run over its steps, or the blends of one by their shares."""

    label: str
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """All models of which the perplexity of `text` is known, scored in `task` by `metric`."""

    text: str
    task: str
    metric: str
    series: list[Series]

    @property
    def points(self) -> list[Point]:
        return [point for series in self.series for point in series.points]

    @property
    def bases(self) -> list[float]:
        """The perplexities of the bases, each once: figures of the same model differ by rounding."""
        values = sorted(point.base for point in self.points if point.base is not None)
        return [
            x for i, x in enumerate(values) if i == 0 or not math.isclose(x, values[i - 1], rel_tol=0.005)
        ]

    @property
    def frontier(self) -> list[Point]:
        """The points that no other one beats, by perplexity."""
        best: list[Point] = []
        for point in sorted(self.points, key=lambda x: (x.perplexity, -x.score)):
            if not best or point.score > best[-1].score:
                best.append(point)
        return best


def panels(runs: Sequence[ComparedRun], *, task: str | None = None, text: str | None = None) -> list[Panel]:
    """A panel for each text of which a perplexity is known, or for `text` alone; none where no run has one.

    `task`: whose score is shown; None: `TASK`. Raises `UserError` for a task or text that no run has.
    """
    if task is not None:
        _require("--task", task, [name for run in runs for name in run.final.tasks])
    texts = list(dict.fromkeys(name for run in runs for name in run.texts))
    if text is not None:
        _require("--text", text, texts)
        texts = [text]
    found = [_panel(runs, name, task or TASK) for name in texts]
    return [panel for panel in found if panel.points]


def _require(option: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        listed = ", ".join(dict.fromkeys(known)) or "none"
        raise UserError(f"{option} {name}: no run has it{did_you_mean(name, known)}; found: {listed}")


def _panel(runs: Sequence[ComparedRun], text: str, task: str) -> Panel:
    series: dict[str, Series] = {}
    blends = sorted(
        (run for run in runs if run.blend is not None), key=lambda run: run.blend.share if run.blend else 0.0
    )
    for run in [*(run for run in runs if run.blend is None), *blends]:
        label = f"blends of {run.blend.of}" if run.blend else run.label
        series.setdefault(label, Series(label=label)).points.extend(_points(run, text, task))
    metric = next((run.final.tasks[task].headline for run in runs if task in run.final.tasks), "")
    return Panel(text=text, task=task, metric=metric, series=[x for x in series.values() if x.points])


def _points(run: ComparedRun, text: str, task: str) -> Iterator[Point]:
    """Of a run its evaluations in the order of steps; of a result file its one model. What is not finite has no place."""
    scores: dict[int | None, float] = dict(run.curves.get(task, []))
    final = run.final.tasks.get(task)
    last = max(scores, default=None, key=lambda step: step or 0)
    if final is not None:
        scores[last] = final.score
    for step, figure in run.texts.get(text, {}).items():
        if step not in scores or not math.isfinite(figure.perplexity):
            continue
        ends = final is not None and step == last
        yield Point(
            name=f"{run.blend.share:g}" if run.blend else "" if step is None else str(step),
            perplexity=figure.perplexity,
            base=figure.base,
            score=scores[step],
            interval=final.interval if final is not None and ends else None,
        )


HEADERS = (
    "model",
    "step or share",
    "perplexity",
    "times the base's",
    "score [95 % interval]",
    "on the frontier",
)


def frontier_lines(panel: Panel) -> Iterator[list[str]]:
    """The rows of a panel's table, under `HEADERS`."""
    best = panel.frontier
    for series in panel.series:
        for point in series.points:
            score = f"{point.score:.3f}"
            if point.interval is not None:
                score += f" [{point.interval[0]:.2f}, {point.interval[1]:.2f}]"
            times = f"{point.perplexity / point.base:.2f}" if point.base else "–"
            on = "yes" if any(point is other for other in best) else ""
            yield [series.label, point.name or "–", f"{point.perplexity:.2f}", times, score, on]
