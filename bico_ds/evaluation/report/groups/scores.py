"""The scores of a group of runs: mean, spread over runs, and the interval over persons and runs; and their curves."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from bico_ds.common.errors import UserError
from bico_ds.evaluation.report.groups.grouping import Group
from bico_ds.evaluation.report.paired import Difference, same_prompts
from bico_ds.evaluation.report.runs import Band, ComparedRun, Curve, TextFigure, TextFigures
from bico_ds.evaluation.results import EvaluationResult, TaskResult, load_result
from bico_ds.evaluation.scoring.crossed import crossed_interval
from bico_ds.runtime.run_folder import RunFolder

Interval = tuple[float, float]
Point = TypeVar("Point")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One metric over the runs of a group; `sd`: the sample standard deviation, None of a single run."""

    mean: float
    sd: float | None
    lowest: float
    highest: float
    runs: int


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(
        mean=statistics.fmean(values),
        sd=statistics.stdev(values) if len(values) > 1 else None,
        lowest=min(values),
        highest=max(values),
        runs=len(values),
    )


@dataclass(frozen=True)
class GroupScores:
    """What the runs of a group have in common, and how far they differ."""

    group: Group

    @property
    def label(self) -> str:
        return self.group.label

    @cached_property
    def runs(self) -> list[ComparedRun]:
        return [member.run for member in self.group.members]

    def tasks(self, name: str) -> list[TaskResult]:
        """The final results of a task, of the runs that were asked it."""
        return [run.final.tasks[name] for run in self.runs if name in run.final.tasks]

    def spread(self, metric: str) -> Spread | None:
        """A metric by its name (`metric_keys`) over the runs that have it; None where none has."""
        values = [run.numbers[metric] for run in self.runs if metric in run.numbers]
        return spread_of(values) if values else None

    def mean(self, metric: str) -> float | None:
        """The mean of a metric; None where no run has it."""
        spread = self.spread(metric)
        return None if spread is None else spread.mean

    @property
    def single_scores(self) -> dict[str, list[float]]:
        """By task the final scores of the runs; empty of a single run."""
        names = dict.fromkeys(name for run in self.runs for name in run.final.tasks)
        return (
            {name: [task.score for task in self.tasks(name)] for name in names} if len(self.runs) > 1 else {}
        )

    def interval(self, name: str) -> Interval | None:
        """The interval of a task's mean headline score over persons and runs; None where the answers are not known."""
        return _interval(self.tasks(name))

    def minus(self, other: GroupScores, name: str) -> Difference | None:
        """The headline score of a task less that of another group; None unless all runs answered the same prompts."""
        both = [self.tasks(name), other.tasks(name)]
        if not all(both) or not _answered_the_same([*both[0], *both[1]]):
            return None
        ours, theirs = map(_scores, both)
        persons = _persons(both[0][0])
        return Difference(
            mean=statistics.fmean(map(statistics.fmean, ours))
            - statistics.fmean(map(statistics.fmean, theirs)),
            interval=crossed_interval(ours, persons, minus=theirs),
            prompts=len(persons),
            persons=len(set(persons)),
        )

    @property
    def has_bands_of_intervals(self) -> bool:
        """Whether the bands of `as_run` are intervals; else they are the ranges of the runs."""
        return all(
            len(self._interval_bands.get(task, [])) == len(curve) for task, curve in self._curves.items()
        )

    def as_run(self, *, bands_of_intervals: bool) -> ComparedRun:
        """The group as one run, for pictures: mean scores, and mean perplexities, at the steps that all its runs have."""
        if len(self.runs) == 1:
            bands = self._interval_bands if bands_of_intervals else {}
            return replace(self.runs[0], label=self.label, bands=bands)
        names = dict.fromkeys(name for run in self.runs for name in run.final.tasks)
        return ComparedRun(
            label=self.label,
            final=EvaluationResult(tasks={name: self._mean_task(name) for name in names}),
            curves=self._curves,
            bands=self._interval_bands if bands_of_intervals else self._ranges,
            texts=_mean_texts([run.texts for run in self.runs]),
        )

    def _mean_task(self, name: str) -> TaskResult:
        tasks = self.tasks(name)
        headline, found = tasks[0].headline, self.interval(name)
        return TaskResult(
            headline=headline,
            metrics={headline: statistics.fmean(task.score for task in tasks)},
            intervals={headline: found} if found is not None else {},
            floors=tasks[0].floors,
        )

    @cached_property
    def _curves(self) -> dict[str, Curve]:
        return self._over_steps(lambda step, scores: (step, statistics.fmean(scores)))

    @cached_property
    def _ranges(self) -> dict[str, Band]:
        return self._over_steps(lambda step, scores: (step, min(scores), max(scores)))

    def _over_steps(self, point: Callable[[int, list[float]], Point]) -> dict[str, list[Point]]:
        """By task a point for every step at which all runs that have the task were evaluated."""
        found = {}
        for name in dict.fromkeys(name for run in self.runs for name in run.curves):
            curves = [dict(run.curves[name]) for run in self.runs if name in run.curves]
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            found[name] = [point(step, [curve[step] for curve in curves]) for step in steps]
        return found

    @cached_property
    def _interval_bands(self) -> dict[str, Band]:
        """Of the evaluations whose answers were kept in all runs."""
        if len(self.runs) == 1:
            return self.runs[0].bands
        bands: dict[str, Band] = {name: [] for name in self._curves}
        for step in sorted({step for curve in self._curves.values() for step, _ in curve}):
            kept = self._kept(step)
            for name, curve in self._curves.items():
                asked = [run.label for run in self.runs if name in run.curves]
                tasks = [kept[label].tasks[name] for label in asked if name in kept[label].tasks]
                if any(step == of for of, _ in curve) and len(tasks) == len(asked):
                    bands[name] += [(step, *found)] if (found := _interval(tasks)) is not None else []
        return bands

    def _kept(self, step: int) -> Mapping[str, EvaluationResult]:
        """The kept evaluation of a step by run, without tasks where there is none that can be read."""
        found = {}
        for member in self.group.members:
            found[member.run.label] = EvaluationResult(tasks={})
            with contextlib.suppress(UserError):
                found[member.run.label] = load_result(RunFolder(member.path).evaluation_file(step))
        return found


def _interval(tasks: Sequence[TaskResult]) -> Interval | None:
    if len(tasks) == 1:
        return tasks[0].interval
    if not tasks or not _answered_the_same(tasks):
        return None
    return crossed_interval(_scores(tasks), _persons(tasks[0]))


def _answered_the_same(tasks: Sequence[TaskResult]) -> bool:
    return all(same_prompts(tasks[0], task) for task in tasks)


def _scores(tasks: Sequence[TaskResult]) -> list[list[float]]:
    return [[prompt[task.headline] for prompt in task.prompts] for task in tasks]


def _persons(task: TaskResult) -> list[str]:
    return [prompt["group"] for prompt in task.prompts]


def _mean_texts(runs: Sequence[TextFigures]) -> TextFigures:
    """Mean perplexities at the steps that all runs with the text have."""
    found: TextFigures = {}
    for name in dict.fromkeys(name for texts in runs for name in texts):
        known = [texts[name] for texts in runs if name in texts]
        for step in (step for step in known[0] if all(step in figures for figures in known)):
            figures = [own[step] for own in known]
            bases = [figure.base for figure in figures if figure.base is not None]
            found.setdefault(name, {})[step] = TextFigure(
                statistics.fmean(figure.perplexity for figure in figures),
                statistics.fmean(bases) if len(bases) == len(figures) else None,
            )
    return found
