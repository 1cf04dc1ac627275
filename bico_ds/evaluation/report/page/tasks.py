"""The sections of what was asked: the table of tasks, and sample answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bico_ds.common.printable import on_one_line
from bico_ds.evaluation.report.comparison import remarks
from bico_ds.evaluation.report.page.html import Html, details, element, joined, section, table
from bico_ds.evaluation.report.page.scores import METRICS, cell, figure_of, task_names
from bico_ds.evaluation.report.page.source import ReportedRun
from bico_ds.evaluation.report.paired import paired_differences
from bico_ds.evaluation.report.tables import contamination_lines, difference_lines
from bico_ds.evaluation.report.wording import title_of
from bico_ds.evaluation.results import EvaluationResult, TaskResult

_CAPTION = "Scores with 95 % intervals over persons"
_MOST_COLUMNS = 4
_SAMPLES = 2  # right ones, and wrong ones, of each run and task; of more runs than `_MOST_COLUMNS` one
_MOST_ASKED = 6  # different questions of a task that are shown
_MOST_CHARACTERS = 320


def task_table(runs: Sequence[ReportedRun]) -> Html | None:
    """The headline scores with intervals, paired differences, and scores by what the training texts hold."""
    names = task_names(runs)
    if not names:
        return None
    results = {run.label: run.compared.final for run in runs}
    metrics = dict.fromkeys(
        run.tasks[n].headline for n in names for run in results.values() if n in run.tasks
    )
    return section(
        "tasks",
        "Every task",
        *(element("p", f"{name}: {METRICS[name]}.", class_="soft") for name in metrics if name in METRICS),
        _scores_by_run(runs, names) if len(runs) > _MOST_COLUMNS else _scores_by_task(runs, names),
        element(
            "p",
            "Persons, not questions, were resampled for the intervals: the questions about one person are right or wrong "
            "together. Where all answers are right, or all wrong, the one shown here is exact instead, over persons. The "
            "score of another person's answer is what guessing would reach.",
            class_="note",
        ),
        *(element("p", f"{remark}.", class_="note") for remark in remarks([run.compared for run in runs])),
        _differences(runs),
        _apart(results),
    )


def _scores_by_task(runs: Sequence[ReportedRun], names: Sequence[str]) -> Html:
    """A row for each task, a column for each run."""
    rows = []
    for name in names:
        found = [run.compared.final.tasks.get(name) for run in runs]
        cells = (cell(task, number) for number, task in enumerate(found))
        rows.append(
            (_heading(name), _known(runs, name)[0].headline, *cells, _floor(runs, name), _count(runs, name))
        )
    headers = ("task", "metric", *(run.label for run in runs), "another person's answer", "questions")
    return table(_CAPTION, headers, rows, words=("metric",), as_cards=True)


def _scores_by_run(runs: Sequence[ReportedRun], names: Sequence[str]) -> Html:
    """A row for each run, a column for each task: of many runs."""
    rows: list[list[Any]] = [
        [run.label, *(cell(run.compared.final.tasks.get(name), number) for name in names)]
        for number, run in enumerate(runs)
    ]
    rows.append(["another person's answer", *(_floor(runs, name) for name in names)])
    rows.append(["questions", *(_count(runs, name) for name in names)])
    return table(_CAPTION, ("run", *map(title_of, names)), rows, as_cards=True)


def _heading(name: str) -> Html | str:
    """A task as a reader would call it, and as recipes do."""
    title = title_of(name)
    return title if title == name else joined((title, element("span", name, class_="interval")))


def _known(runs: Sequence[ReportedRun], name: str) -> list[TaskResult]:
    return [run.compared.final.tasks[name] for run in runs if name in run.compared.final.tasks]


def _floor(runs: Sequence[ReportedRun], name: str) -> str:
    known = _known(runs, name)
    floors = [task.floors[task.headline] for task in known if task.headline in task.floors]
    return figure_of(known[0], floors[0]) if floors else "–"


def _count(runs: Sequence[ReportedRun], name: str) -> str:
    return " / ".join(dict.fromkeys(str(len(task.prompts) or "–") for task in _known(runs, name)))


def _differences(runs: Sequence[ReportedRun]) -> Html | None:
    """Each later run minus the first, where both were asked the same."""
    first = runs[0].compared
    tables = []
    for run in (run.compared for run in runs[1:]):
        both = [name for name in first.final.tasks if name in run.final.tasks]
        pairs = {name: paired_differences(first.final.tasks[name], run.final.tasks[name]) for name in both}
        rows = list(difference_lines({name: found for name, found in pairs.items() if found}))
        if rows:
            headers = ("task", "metric", "difference [95 % interval]", "questions", "persons")
            tables.append(table(f"{run.label} minus {first.label}", headers, rows, words=("metric",)))
    return details(f"Differences from {first.label}, question by question", *tables) if tables else None


def _apart(results: Mapping[str, EvaluationResult]) -> Html | None:
    """Scores by what the training texts hold, where they were searched."""
    rows = list(contamination_lines(results))
    if not rows:
        return None
    caption = (
        "same: what is asked about, then the answer; reverse: the answer first; same and both are recall"
    )
    headers = ("task", "in the training texts", "metric", *results, "questions")
    found = table(caption, headers, rows, words=("in the training texts", "metric"))
    return details("Scores by what the training texts hold of the questions", found)


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
    samples = _SAMPLES if len(tasks) <= _MOST_COLUMNS else 1
    for rows, task in zip(answered, tasks, strict=True):
        if not rows:
            continue
        scores = {question: row[task.headline] for question, row in rows.items()}
        for ends in (max(scores.values()), min(scores.values())):
            same = [question for question in rows if scores[question] == ends]
            known = sum(question in chosen for question in same)
            every = max(1, len(same) // samples)
            # Spread over the task: neighbours are about the same person.
            chosen |= dict.fromkeys(same[::every][: max(0, samples - known)])
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
