"""The part of a model card that says what was measured, with intervals, and what was not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.training.export.facts import ExportFacts
from bico_ds.training.export.markdown import plain, table

_HELD_OUT = "evaluation/held_out/"


def scores_text(facts: ExportFacts, *, is_blend: bool) -> list[str]:
    """The lines of the section. `is_blend`: the weights are not those that were measured."""
    result = facts.evaluation
    lines = ["## What was measured", ""]
    if result is None:
        return [*lines, f"Nothing: {plain(facts.no_evaluation)}."]
    if is_blend:
        lines += ["**Of the run's own weights, not of this blend**, which was not measured.", ""]
    tasks = _task_rows(result)
    texts = _text_rows(result, facts.texts_before)
    held_out = _held_out_rows(result)
    for headers, rows in (
        (("task", "metric", "score", "95 % interval", "questions", "answered by the training texts"), tasks),
        (("text", "perplexity before", "after", "after / before"), texts),
        (("held-out text", "objective", "loss, nats per target"), held_out),
    ):
        if lines_of_table := table(headers, rows):
            lines += [*lines_of_table, ""]
    return [*lines, *_explained(result, has_held_out=bool(held_out))]


def _task_rows(result: EvaluationResult) -> list[Sequence[str]]:
    return [
        (
            plain(name),
            plain(task.headline),
            f"{task.score:.3f}",
            _interval(task),
            f"{len(task.prompts):,}" if task.prompts else "",
            _answered(result.training_texts.get(name)),
        )
        for name, task in result.tasks.items()
    ]


def _interval(task: TaskResult) -> str:
    return "" if task.interval is None else f"{task.interval[0]:.3f} to {task.interval[1]:.3f}"


def _answered(found: Mapping[str, Any] | None) -> str:
    """How many questions' answers the texts give in the order in which they are asked."""
    if found is None:
        return "not searched"
    scores = found["scores"]
    asked = sum(scores[order]["prompts"] for order in ("same", "both") if order in scores)
    return f"{asked:,} in the order asked"


def _text_rows(result: EvaluationResult, before: Mapping[str, Mapping[str, Any]]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for name, text in result.texts.items():
        times = text.get("times")
        start = before.get(name, {}).get("perplexity") if times is not None else None
        shown = ("" if value is None else f"{value:.3f}" for value in (start, text["perplexity"], times))
        rows.append((plain(name), *shown))
    return rows


def _held_out_rows(result: EvaluationResult) -> list[Sequence[str]]:
    found = [
        (tag.removeprefix(_HELD_OUT), value)
        for tag, value in result.scalars().items()
        if tag.startswith(_HELD_OUT)
    ]
    return [
        (plain(name), plain(objective), f"{value:.4f}")
        for key, value in found
        for name, objective in [key.rsplit("/", 1)]
    ]


def _explained(result: EvaluationResult, *, has_held_out: bool) -> Iterator[str]:
    if result.tasks:
        yield (
            "The answers are greedy. Intervals: 95 %, the persons or things that are asked about resampled; they tell "
            "nothing of another seed."
        )
    missing = [
        what
        for what, is_there in (
            ("questions", bool(result.tasks)),
            ("the loss of held-out texts", has_held_out),
            ("what it has forgotten (the perplexity of other texts)", bool(result.texts)),
        )
        if not is_there
    ]
    missing.append("safety, bias, and whatever else is not in these tables")
    yield f"Not measured: {'; '.join(missing)}."
