"""The first screen: what was asked, and what the runs answered, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bico_ds.common.printable import on_one_line
from bico_ds.evaluation.report.page.html import Html, element, joined
from bico_ds.evaluation.report.page.numbers import amount, compact, in_words
from bico_ds.evaluation.report.page.scores import bar, figure_of, range_of, task_names
from bico_ds.evaluation.report.page.source import ReportedRun
from bico_ds.evaluation.report.wording import WORDINGS, title_of
from bico_ds.evaluation.results import ORDERS, TaskResult

_MOST_NAMED = 3  # runs in a sentence
_MOST_IN_CARD = 6  # of more the first task alone is drawn
_MOST_OF_REASON, _MOST_OF_EXAMPLE = 300, 120
_READ = {
    "same": "in the direction asked, so that the answer can be recalled",
    "reverse": "the other way round alone",
    "both": "in both directions, so that the answer can be recalled",
    "neither": "not at all",
}


def verdict(runs: Sequence[ReportedRun]) -> Html:
    """Heading, question and answer."""
    names = task_names(runs)
    reverse = [name for name in names if name in WORDINGS and WORDINGS[name].is_reverse]
    if not reverse:
        return _without_reversal(runs)
    first, *others = reverse
    forward = [name for name in names if name in WORDINGS and not WORDINGS[name].is_reverse]
    words = [
        element("p", _question(first), class_="question"),
        _example(runs, first),
        element("p", "Asked the other way round, ", *_answers(runs, first), class_="answer"),
        *(element("p", _aside(name), *_answers(runs, name), class_="also") for name in others),
        *(element("p", f"As read ({WORDINGS[name].arrow}), ", *_answers(runs, name), class_="also") for name in forward),
        *(element("p", line, class_="note") for line in (*_searched(runs, first), *_unasked(runs, first), *_states(runs))),
    ]  # fmt: skip
    card = _card(runs, [*reverse, *forward][: None if len(runs) <= _MOST_IN_CARD else 1])
    who = "Does it" if len(runs) == 1 else "Do they"
    return joined(
        (
            element("h1", f"{who} answer the other way round?"),
            element("div", element("div", *words), card, class_="verdict"),
        )
    )


def answer_in_words(runs: Sequence[ReportedRun]) -> str:
    """The answer as a line of text; empty for runs that were asked nothing the other way round."""
    asked = (name for name in task_names(runs) if name in WORDINGS and WORDINGS[name].is_reverse)
    name = next(asked, None)
    if name is None:
        return ""
    return f"Asked the other way round, {joined(_answers(runs, name)).text()}"


def _question(task: str) -> str:
    wording = WORDINGS[task]
    return (
        f"The training texts about these persons give the {wording.first} first and the "
        f"{wording.given if wording.is_reverse else wording.wanted} after it. "
        f"Given the {wording.given}, does the model write the {wording.wanted}?"
    )


def _example(runs: Sequence[ReportedRun], task: str) -> Html | None:
    """One of the questions, with its answer; None where none was kept."""
    known = (run.compared.final.tasks[task].prompts for run in runs if task in run.compared.final.tasks)
    prompt = next((prompts[0] for prompts in known if prompts), None)
    if prompt is None:
        return None
    asked, answer = (on_one_line(prompt[key].strip(), most=_MOST_OF_EXAMPLE) for key in ("prompt", "answer"))
    quoted = [element("span", text, class_="quoted") for text in (asked, answer)]
    return element(
        "p", "For example ", quoted[0], " should be followed by ", quoted[1], ".", class_="example"
    )


def _aside(task: str) -> str:
    wording = WORDINGS[task]
    return f"Of persons whose texts give the {wording.first} first ({wording.arrow}), "


def _answers(runs: Sequence[ReportedRun], task: str) -> Iterator[Html | str]:
    """The rest of a sentence: each run with its score, or the best and the worst of many."""
    asked = [run for run in runs if task in run.compared.final.tasks]
    counts = {len(run.compared.final.tasks[task].prompts) for run in asked}
    same = len(counts) == 1
    if len(asked) <= _MOST_NAMED:
        for number, run in enumerate(asked):
            yield "" if number == 0 else " and " if number == len(asked) - 1 else ", "
            yield from _answer(run, task, is_first=number == 0, is_counted=number == 0 or not same)
        yield "."
        return
    ranked = sorted(asked, key=lambda run: -run.compared.final.tasks[task].score)
    yield from _answer(ranked[0], task, is_first=True, is_counted=True)
    if ranked[0].compared.final.tasks[task].score == ranked[-1].compared.final.tasks[task].score:
        yield f", and so do all {len(asked)} runs."
        return
    yield f", the best of {len(asked)} runs; the worst, "
    yield from _answer(ranked[-1], task, is_first=False, is_counted=not same)
    yield "."


def _answer(run: ReportedRun, task: str, *, is_first: bool, is_counted: bool) -> Iterator[Html | str]:
    """`is_counted`: with the number of its questions, which is not that of a run before it."""
    result = run.compared.final.tasks[task]
    is_bleu = result.headline == "bleu"
    verb = ("reaches a word BLEU of " if is_bleu else "answers ") if is_first else ""
    yield f"{run.label} {verb}"
    yield element("strong", figure_of(result))
    yield f" ({range_of(result)})" if range_of(result) else ""
    if is_counted and result.prompts:
        yield f" {'over' if is_bleu else 'of'} {amount(len(result.prompts), 'question')}"


def _searched(runs: Sequence[ReportedRun], task: str) -> Iterator[str]:
    """What the training texts hold of the task's questions, where they were searched."""
    known = {run.label: _orders(run, task) for run in runs}
    different = list(dict.fromkeys(filter(None, known.values())))
    for sentence in different:
        labels = [label for label, found in known.items() if found == sentence]
        whose = "the training texts" if len(different) == 1 else f"the training texts of {in_words(labels)}"
        yield f"{whose[:1].upper()}{whose[1:]} hold {sentence}."
    if not different:
        yield "Whether the training texts hold the answers was not searched."


def _orders(run: ReportedRun, task: str) -> str:
    scores = run.compared.final.training_texts.get(task, {}).get("scores", {})
    counts = [(order, scores[order]["prompts"]) for order in ORDERS if order in scores]
    if len(counts) == 1:
        return f"all {amount(counts[0][1], 'question')} {_READ[counts[0][0]]}"
    return ", ".join(f"{amount(count, 'question')} {_READ[order]}" for order, count in counts)


def _unasked(runs: Sequence[ReportedRun], task: str) -> Iterator[str]:
    unasked = [run.label for run in runs if task not in run.compared.final.tasks]
    if unasked:
        yield f"Not asked: {in_words(unasked)}."


def _states(runs: Sequence[ReportedRun]) -> Iterator[str]:
    """Runs that are not done."""
    for run in runs:
        state, step = run.state.get("state"), run.state.get("step")
        if state in (None, "done"):
            continue
        reason = on_one_line(run.state.get("reason", ""), most=_MOST_OF_REASON)
        at = f" at step {step}" if step is not None else ""
        yield f"{run.label} is not done: {state}{at}{f' ({reason})' if reason else ''}."


def _card(runs: Sequence[ReportedRun], tasks: Sequence[str]) -> Html:
    """The same as bars. The words beside it say all that they show."""
    groups = []
    for task in tasks:
        rows = [
            _row(run.label, run.compared.final.tasks[task], number)
            for number, run in enumerate(runs)
            if task in run.compared.final.tasks
        ]
        wording = WORDINGS[task]
        way = "the other way round" if wording.is_reverse else "as read"
        heading = element("p", element("b", way), f" {wording.arrow}", class_="card-title")
        groups.append(element("div", heading, *rows))
    return element("div", *groups, class_="card", aria_hidden="true")


def _row(label: str, result: TaskResult, number: int) -> Html:
    return element(
        "div",
        element("span", label, class_="card-label"),
        bar(result, number),
        element("b", figure_of(result)),
        class_="card-row",
    )


def _without_reversal(runs: Sequence[ReportedRun]) -> Html:
    """Of runs that were asked nothing that is known to be the other way round: that, and how far they came."""
    names = task_names(runs)
    what = "question" if all(name in WORDINGS for name in names) else "name–description question"
    lines = [element("p", f"{title_of(name)}: ", *_answers(runs, name), class_="also") for name in names]
    lines += [element("p", line, class_="also") for run in runs if (line := _progress(run))]
    return joined(
        (
            element(
                "h1", "How the training went" if any(run.folder for run in runs) else "What was measured"
            ),
            element("p", f"No {what} was asked the other way round.", class_="answer"),
            *lines,
            *(element("p", line, class_="note") for line in _states(runs)),
        )
    )


def _progress(run: ReportedRun) -> str:
    series = run.logged.series.get("loss/all")
    if series is None:
        return ""
    return (
        f"{run.label}: the loss went from {compact(series.values[0])} at step {series.steps[0]:,} to "
        f"{compact(series.values[-1])} at step {series.steps[-1]:,}."
    )
