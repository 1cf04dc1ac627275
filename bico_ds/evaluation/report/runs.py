"""The runs of a comparison: final scores and curves, read from their folders."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import is_number
from bico_ds.evaluation.report.metric_keys import numbers_of_line, numbers_of_texts
from bico_ds.evaluation.results import EvaluationResult, TaskResult, load_result, read_result, result_in
from bico_ds.evaluation.scoring.metrics import METRICS
from bico_ds.evaluation.tasks.jsonl import parse_object
from bico_ds.runtime.run_folder import RunFolder

_PREFIX, _WORK = "evaluation/", "work/"
_PERPLEXITY = re.compile(rf"{_PREFIX}text/(.+)/perplexity$")

# Where `bico-ds export --blend` puts a blend: the folder's name is its share of the fine-tuned weights.
_BLEND = re.compile(r"(?:^|/)([^/]+)/blend-(\d+(?:\.\d+)?)/?$")

Curve = list[tuple[int, float]]
Band = list[tuple[int, float, float]]
Line = tuple[str, dict[str, Any]]  # of a run's metrics, with its place


class TextFigure(NamedTuple):
    """The perplexity of a text, and that under the base, where it is known."""

    perplexity: float
    base: float | None


class Blend(NamedTuple):
    """A model that is `share` of the fine-tuned model `of` and the rest its base."""

    of: str
    share: float


class Work(NamedTuple):
    """What a run had done when it was evaluated last.

    Over all objectives: updates, rows through the model, tokens of the texts, useful FLOPs (None: not known) and seconds of
    its steps.
    """

    updates: int
    rows: int
    tokens: int
    flops: float | None
    seconds: float


# By text and step; the step of a result file, which has no other, is None.
TextFigures = dict[str, dict[int | None, TextFigure]]


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One column of the comparison.

    `curves`: (step, headline score) by task, in the order of steps. `texts`: perplexities, in that order. `blend`: what the
    model was blended from, where it is a blend. `work`: None where that is not known: of a result file, and of a run of
    before it was logged. `bands`: (step, lower, upper bound of the score's 95 % interval) by task, as far as they are known.
    `numbers`: all of its last evaluation, by metric (`metric_keys`). `step`: of that evaluation, where it is a run's.
    """

    label: str
    final: EvaluationResult
    curves: dict[str, Curve]
    texts: TextFigures = field(default_factory=dict)
    blend: Blend | None = None
    work: Work | None = None
    bands: dict[str, Band] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    step: int | None = None

    def mean(self, metric: str) -> float | None:
        """The metric of its last evaluation; None where that has none. A group of runs has the mean."""
        return self.numbers.get(metric)


def load_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read run folders, or result files of `bico-ds evaluate`.

    A run's final scores are those of its last evaluation in `metrics.jsonl`; the result file of that step, where there is
    one, adds intervals, floors and answers. Raises `UserError` for a run that was never evaluated, a file that is neither,
    and a run that is named twice.
    """
    return [load_run(path, label) for path, label in zip(paths, labels_of(paths), strict=True)]


def labels_of(paths: Sequence[Path]) -> list[str]:
    """What runs are called: by their names alone, else by their paths from where these part.

    Raises `UserError` for one that is named twice.
    """
    places = [path.resolve() for path in paths]
    if len(set(places)) < len(places):
        raise UserError(f"the same run is named twice: {', '.join(map(str, paths))}")
    stems = [place.stem if place.is_file() else place.name for place in places]
    if len(set(stems)) == len(stems):
        return stems
    above = os.path.commonpath([place.parent for place in places])
    return [str(place.relative_to(above)) for place in places]


def load_run(path: Path, label: str) -> ComparedRun:
    """The run of a folder or a result file. Raises `UserError` as `load_runs` does."""
    if path.is_file():
        values = read_result(path)
        return run_of_file(values, path, label, result_in(values, path))
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder or result file")
    folder = RunFolder(path)
    lines = _lines(folder.metrics_file)
    run = run_of_folder(folder, label, lines, _raise)
    if not run.curves:
        found = "only texts were evaluated, no reversal task," if run.texts else "no evaluation"
        raise UserError(
            f"{path}: {found} in {folder.metrics_file.name}; set 'evaluation.tasks' in the recipe, or evaluate the "
            "run's export with bico-ds evaluate and name the result file here"
        )
    return run


def run_of_file(values: Mapping[str, Any], path: Path, label: str, final: EvaluationResult) -> ComparedRun:
    """The run of a result file with these values (`read_result`), which hold this result."""
    texts = _texts_of_file(values)
    return ComparedRun(
        label=label,
        final=final,
        curves={},
        texts=texts,
        blend=_blend_of(str(values.get("model", ""))),
        numbers=_headlines(final) | numbers_of_line(final.scalars()) | numbers_of_texts(texts),
    )


def run_of_folder(
    folder: RunFolder, label: str, lines: Sequence[Line], on_fault: Callable[[UserError], None]
) -> ComparedRun:
    """The run of a folder whose metrics have these lines; one that was never evaluated has no tasks and no curves.

    `on_fault` gets what is wrong with a line, or with the result file of the last step; where it returns, the rest is read.
    """
    records = _evaluations(lines, on_fault)
    evaluations = {step: record.tasks for step, record in records.items() if record.tasks}
    curves: dict[str, Curve] = {}
    bands: dict[str, Band] = {}
    for step, tasks in evaluations.items():
        for name, task in tasks.items():
            curves.setdefault(name, []).append((step, task.score))
            if task.interval is not None:
                bands.setdefault(name, []).append((step, *task.interval))
    texts: TextFigures = {}
    for step, record in records.items():
        for name, figure in record.texts.items():
            texts.setdefault(name, {})[step] = figure
    last = max(evaluations, default=None)
    if last is None:
        return ComparedRun(label=label, final=EvaluationResult(tasks={}), curves=curves, texts=texts)
    final = EvaluationResult(tasks=evaluations[last])
    if (result_file := folder.evaluation_file(last)).is_file():
        try:
            final = load_result(result_file)
        except UserError as error:
            on_fault(error)
    return ComparedRun(
        label=label,
        final=final,
        curves=curves,
        texts=texts,
        work=_work(lines, last),
        bands=bands,
        numbers=_headlines(final) | records[last].numbers,
        step=last,
    )


def _raise(error: UserError) -> None:
    raise error


def _headlines(final: EvaluationResult) -> dict[str, float]:
    return {f"{name}/headline": task.score for name, task in final.tasks.items()}


def _texts_of_file(values: Mapping[str, Any]) -> TextFigures:
    """Perplexities in a result file of `bico-ds evaluate`, or in a run's evaluation of one step."""
    found: TextFigures = {}
    for name, text in values.get("texts", {}).items():
        found[name] = {None: _figure(text["perplexity"], text.get("times"))}
    for name, text in values.get("retention", {}).items():
        base = values.get("retention_before", {}).get(name)
        # As in the table of `bico-ds evaluate`: only figures of the same text and window stand side by side.
        known = base and all(base.get(key) == text.get(key) for key in ("text_sha256", "window", "tokens"))
        found[name] = {None: TextFigure(text["perplexity"], base["perplexity"] if known else None)}
    return found


def _figure(perplexity: float, times: float | None) -> TextFigure:
    return TextFigure(perplexity, perplexity / times if times else None)


def _blend_of(model: str) -> Blend | None:
    found = _BLEND.search(model)
    return Blend(found.group(1), float(found.group(2))) if found else None


class Record(NamedTuple):
    """An evaluation, as a line of metrics has it."""

    tasks: dict[str, TaskResult]
    texts: dict[str, TextFigure]
    numbers: dict[str, float]


def _lines(metrics: Path) -> list[Line]:
    """The lines of a run's metrics, each with its place."""
    if not metrics.is_file():
        return []
    try:
        text = metrics.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{metrics}: cannot be read as UTF-8 text: {error}") from error
    complete_lines = text.split("\n")[:-1]  # the last line may be half written
    places = (f"{metrics}:{number}" for number in range(1, len(complete_lines) + 1))
    return [(place, parse_object(line, place)) for place, line in zip(places, complete_lines, strict=True)]


def _evaluations(lines: Sequence[Line], on_fault: Callable[[UserError], None]) -> dict[int, Record]:
    """Task results and texts by step, in the order of steps.

    A resumed run may have written a step twice: the last one counts.
    """
    found: dict[int, Record] = {}
    for place, record in lines:
        if record.get("kind") != "evaluation":
            continue
        try:
            found[int(record["step"])] = Record(
                _task_results(record), _text_figures(record), numbers_of_line(record)
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            on_fault(UserError(f"{place}: not an evaluation as a run writes it ({error!r})"))
    return dict(sorted(found.items()))


def work_in(metrics: Path) -> Work | None:
    """What a run had done at the last step of training that is in this file; None where that was not logged yet."""
    lines = _lines(metrics)
    steps = [record["step"] for _, record in lines if record.get("kind") == "train" and "step" in record]
    return _work(lines, steps[-1]) if steps else None


def _work(lines: Sequence[Line], step: int) -> Work | None:
    """What was done until that step, by the last line of it that says so."""
    written = (work_of(record) for _, record in reversed(lines) if record.get("step") == step)
    return next(filter(None, written), None)


def work_of(record: Mapping[str, Any]) -> Work | None:
    """What was done, by the keys `work/…` of a line of metrics; None where it has none."""
    done = {key: amount for key, amount in record.items() if key.startswith(_WORK) and is_number(amount)}
    if not done:
        return None
    totals: dict[str, float] = defaultdict(float)
    for key, amount in done.items():
        totals[key.removeprefix(_WORK).split("/")[0]] += amount
    if not all(map(math.isfinite, totals.values())):  # damage, of numbers that are finite one by one
        return None
    return Work(
        updates=int(totals["updates"]),
        rows=int(totals["rows"]),
        tokens=int(totals["tokens"]),
        flops=totals.get("flops"),
        seconds=totals["seconds"],
    )


def logged_headline(keys: Container[str]) -> str | None:
    """Which metric of a task is its headline, by the keys that a line of metrics has of it; None where none can be.

    A line says so, as `headline/METRIC`, where its metrics alone would not tell (`headline_keys`).
    """
    told = (name for name in METRICS if f"headline/{name}" in keys)
    return next(told, next((name for name in ("bleu", "contains") if name in keys), None))


def headline_keys(task: TaskResult) -> list[str]:
    """Under which keys a line of metrics has a task's headline score."""
    told = logged_headline(task.metrics) == task.headline
    return ["headline"] if told else ["headline", f"headline/{task.headline}"]


def _task_results(record: dict[str, Any]) -> dict[str, TaskResult]:
    keys: dict[str, dict[str, Any]] = {}
    for key, value in record.items():
        if key.startswith(_PREFIX):
            task, _, rest = key.removeprefix(_PREFIX).partition("/")
            keys.setdefault(task, {})[rest] = value
    found = {}
    for task, of_task in keys.items():
        values = {metric: float(of_task[metric]) for metric in of_task if metric in METRICS}
        headline = logged_headline(of_task)
        if headline in values:
            bounds: list[Any] = [record.get(f"{_PREFIX}{task}/headline_{end}") for end in ("low", "high")]
            known = {headline: (float(bounds[0]), float(bounds[1]))} if all(map(is_number, bounds)) else {}
            found[task] = TaskResult(headline=headline, metrics=values, intervals=known)
    return found


def _text_figures(record: dict[str, Any]) -> dict[str, TextFigure]:
    perplexities = {
        found.group(1): float(value) for key, value in record.items() if (found := _PERPLEXITY.match(key))
    }
    return {
        name: _figure(value, record.get(f"{_PREFIX}text/{name}/times_base"))
        for name, value in perplexities.items()
    }
