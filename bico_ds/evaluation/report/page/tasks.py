"""The sections of what was asked: the table of tasks, and sample answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bico_ds.common.printable import on_one_line
from bico_ds.evaluation.report.comparison import remarks
from bico_ds.evaluation.report.page.html import Html, details, element, joined, listed, section, table
from bico_ds.evaluation.report.page.scores import METRICS, cell, figure_of, task_names, title_of
from bico_ds.evaluation.report.page.source import ReportedRun
from bico_ds.evaluation.report.paired import paired_differences
from bico_ds.evaluation.report.tables import contamination_lines, difference_lines

_SAMPLES = 2  # right ones, and wrong ones, of each run and task
_MOST_ASKED = 8  # different questions of a task that are shown
_MOST_CHARACTERS = 320


def task_table(runs: Sequence[ReportedRun]) -> Html | None:
    """The headline scores with intervals, paired differences, and scores by what the training texts hold."""
    names = task_names(runs)
    if not names:
        return None
    compared = [run.compared for run in runs]
    results = {run.label: run.final for run in compared}
    rows = [_task_row(runs, name) for name in names]
    metrics = dict.fromkeys(
        run.final.tasks[n].headline for n in names for run in compared if n in run.final.tasks
    )
    apart = list(contamination_lines(results))
    return section(
        "tasks",
        "Every task",
        *(element("p", f"{name}: {METRICS[name]}.", class_="soft") for name in metrics if name in METRICS),
        table(
            "Scores with 95 % intervals over persons",
            ("task", "metric", *results, "another person's answer", "questions"),
            rows,
            words=("metric",),
            as_cards=True,
        ),
        element(
            "p",
            "Persons, not questions, were resampled for the intervals: the questions about one person are right or wrong "
            "together. Where all answers are right, or all wrong, the interval is the exact one over persons. The score of "
            "another person's answer is what guessing would reach.",
            class_="note",
        ),
        listed(remarks(compared), class_="note"),
        *_differences(runs),
        details(
            "Scores by what the training texts hold of the questions",
            table(
                "same: what is asked about, then the answer; reverse: the answer first; same and both are recall",
                ("task", "in the training texts", "metric", *results, "questions"),
                apart,
                words=("in the training texts", "metric"),
            ),
        )
        if apart
        else None,
    )


def _task_row(runs: Sequence[ReportedRun], name: str) -> list[Any]:
    found = [run.compared.final.tasks.get(name) for run in runs]
    known = [task for task in found if task is not None]
    floors = [task.floors[task.headline] for task in known if task.headline in task.floors]
    counts = dict.fromkeys(str(len(task.prompts) or "–") for task in known)
    title = (
        joined((title_of(name), element("span", name, class_="interval"))) if title_of(name) != name else name
    )
    return [
        title,
        known[0].headline,
        *(cell(task, number) for number, task in enumerate(found)),
        figure_of(known[0], floors[0]) if floors else "–",
        " / ".join(counts),
    ]


def _differences(runs: Sequence[ReportedRun]) -> Iterator[Html]:
    """Each later run minus the first, where both were asked the same."""
    first = runs[0].compared
    for run in (run.compared for run in runs[1:]):
        both = [name for name in first.final.tasks if name in run.final.tasks]
        pairs = {name: paired_differences(first.final.tasks[name], run.final.tasks[name]) for name in both}
        rows = list(difference_lines({name: found for name, found in pairs.items() if found}))
        if rows:
            caption = f"Difference: {run.label} minus {first.label}, question by question"
            headers = ("task", "metric", "difference [95 % interval]", "questions", "persons")
            yield details(caption, table(caption, headers, rows, words=("metric",)))


class _Question(NamedTuple):
    prompt: str
    answer: str


def sample_answers(runs: Sequence[ReportedRun]) -> Html | None:
    """A few questions of each task with what the runs answered, right and wrong; None where no answer was kept."""
    parts = []
    for name in task_names(runs):
        answered = [_answered(run, name) for run in runs]
        chosen = _chosen(answered, [run.compared.final.tasks.get(name) for run in runs])
        if chosen:
            cards = [_card(question, runs, answered, name) for question in chosen]
            parts += [element("h3", title_of(name)), element("ul", *cards, class_="samples")]
    if not parts:
        return None
    said = "Questions as the models got them; ✓ right, ✗ wrong, by the task's metric. Long answers are cut."
    return section("answers", "Sample answers", element("p", said, class_="soft"), *parts)


def _answered(run: ReportedRun, name: str) -> dict[_Question, dict[str, Any]]:
    task = run.compared.final.tasks.get(name)
    prompts = task.prompts if task is not None else []
    return {_Question(row["prompt"], row["answer"]): row for row in prompts if "prediction" in row}


def _chosen(answered: Sequence[dict[_Question, dict[str, Any]]], tasks: Sequence[Any]) -> list[_Question]:
    """Questions such that each run has some of its best answers among them, and some of its worst."""
    chosen: dict[_Question, None] = {}
    for rows, task in zip(answered, tasks, strict=True):
        if not rows:
            continue
        scores = {question: row[task.headline] for question, row in rows.items()}
        for ends in (max(scores.values()), min(scores.values())):
            same = [question for question in rows if scores[question] == ends]
            known = sum(question in chosen for question in same)
            every = max(1, len(same) // _SAMPLES)
            # Spread over the task: neighbours are about the same person.
            chosen |= dict.fromkeys(same[::every][: max(0, _SAMPLES - known)])
    return list(chosen)[:_MOST_ASKED]


def _card(
    question: _Question,
    runs: Sequence[ReportedRun],
    answered: Sequence[dict[_Question, dict[str, Any]]],
    name: str,
) -> Html:
    lines = []
    for run, rows in zip(runs, answered, strict=True):
        if (row := rows.get(question)) is not None:
            score = row[run.compared.final.tasks[name].headline]
            lines.append(
                _said(run.label, row["prediction"], score, run.compared.final.tasks[name].headline == "bleu")
            )
    return element(
        "li",
        element("p", _shown(question.prompt), class_="asked quoted"),
        element(
            "p",
            "Right answer: ",
            element("span", _shown(question.answer), class_="quoted"),
            class_="expected",
        ),
        element("ul", *lines, class_="said"),
    )


def _said(label: str, prediction: str, score: float, is_graded: bool) -> Html:
    if is_graded:
        mark = element("span", f"{score:.2f}", class_="mark-graded")
    else:
        right = score >= 1
        word = "right" if right else "wrong"
        mark = element("span", "✓" if right else "✗", class_=f"mark {word}", role="img", aria_label=word)
    said = element("span", _shown(prediction) or "(nothing)", class_="quoted")
    return element("li", mark, element("span", label, class_="who"), element("p", said))


def _shown(text: str) -> str:
    return on_one_line(text.strip(), most=_MOST_CHARACTERS)
