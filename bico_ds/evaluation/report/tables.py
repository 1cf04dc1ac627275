"""Tables of results, for the terminal and as Markdown."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from bico_ds.common.terminal.fitting_table import FittingTable
from bico_ds.evaluation.report.frontier import HEADERS, Panel, frontier_lines
from bico_ds.evaluation.report.paired import Difference
from bico_ds.evaluation.report.runs import Work
from bico_ds.evaluation.report.wording import question_of
from bico_ds.evaluation.results import ORDERS, EvaluationResult, TaskResult

_AGREEMENT = {
    "agreement": "base's tokens that the model prefers too",
    "base_agreement": "the same of the base (1 but for rounding)",
    "identical_16": "answers with the same first 16 tokens",
    "identical_32": "answers with the same first 32 tokens",
    "log_prob": "log-probability under the model",
    "base_log_prob": "log-probability under the base",
    "log_prob_change": "model minus base",
}
WORK_COLUMNS = (
    "run",
    "updates",
    "tokens through the model",
    "tokens of the texts",
    "FLOPs",
    "beside the first",
    "seconds",
)
# All other columns are figures. The cells of the first kind have blanks, or are names of any length.
_TEXT_COLUMNS = ("run", "measure", "model", "text", "store")
_WORD_COLUMNS = ("task", "metric", "objective", "in the training texts", "on the frontier")
_PIPE_COLUMNS = 200


def console_for_tables() -> Console:
    """The console to print tables on; a pipe or a file, which has no width of its own, gets wide ones."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def result_table(results: Mapping[str, EvaluationResult], *, title: str = "Reversal tasks") -> FittingTable:
    """The headline metric of every task with its 95 % interval, one column per model."""
    lines = _lines(results)
    return score_table(("task", "metric"), results, ("floor", "prompts"), lines, title=title)


def result_markdown(results: Mapping[str, EvaluationResult]) -> str:
    """The same table as Markdown, with each task's question."""
    headers = ["task", "question", "metric", *results, "floor", "prompts"]
    ruler = ["---"] * 3 + ["--:"] * (len(results) + 2)
    lines = [[name, question_of(name), *cells] for name, *cells in _lines(results)]
    return markdown_table([headers, ruler, *lines])


def contamination_table(results: Mapping[str, EvaluationResult]) -> FittingTable:
    """The headline metric by what the training texts hold of the questions, one column per model."""
    return score_table(
        ("task", "in the training texts", "metric"), results, ("prompts",), contamination_lines(results),
        title="By the order in the training texts",
        caption="same: what is asked about, then the answer; reverse: the answer first. Same and both are recall",
    )  # fmt: skip


def contamination_markdown(results: Mapping[str, EvaluationResult]) -> str:
    """The same table as Markdown."""
    headers = ["task", "in the training texts", "metric", *results, "prompts"]
    ruler = ["---"] * 3 + ["--:"] * (len(results) + 1)
    return markdown_table([headers, ruler, *contamination_lines(results)])


def contamination_line(result: EvaluationResult) -> str:
    """The same in one line: for every task the prompts of each order, with their headline score."""
    tasks = [
        f"{name}: "
        + ", ".join(
            f"{order} {scores['metrics'][result.tasks[name].headline]:.3f} ({scores['prompts']} prompts)"
            for order, scores in found["scores"].items()
        )
        for name, found in result.training_texts.items()
    ]
    return "  ".join(tasks)


def answered_line(training_texts: Mapping[str, Mapping[str, Any]]) -> str:
    """How many of each task's questions the training texts answer in the order asked, in one sentence."""
    counts = {name: Counter(found["rows"]) for name, found in training_texts.items()}
    told = [
        f"{count['same'] + count['both']:,} of {count.total():,} of {name}" for name, count in counts.items()
    ]
    return f"questions that the training texts answer already, in the order asked: {', '.join(told)}"


def search_notes(training_texts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """For which tasks the search may have missed questions, and why."""
    for name, found in training_texts.items():
        if found["rewritten"]:
            yield (
                f"{name}: {found['rewritten']} of {len(found['rows'])} questions may not be found, because a tokenizer of "
                "the training texts writes their words otherwise (an unknown word, or a normalizer that changes letters)"
            )
        if found["without_subject"]:
            yield (
                f"{name}: what {found['without_subject']} of {len(found['rows'])} prompts ask about was estimated from the "
                "prompts, and may not be found; the file of the other direction beside theirs tells it, or the field "
                "'subject' of a file of questions"
            )


def contamination_lines(results: Mapping[str, EvaluationResult]) -> Iterator[list[str]]:
    """By task and order: both, headline metric, a score for every model, number of prompts (all, where models differ)."""
    searched = [result for result in results.values() if result.training_texts]
    for name in dict.fromkeys(name for result in searched for name in result.training_texts):
        metric = next(result.tasks[name].headline for result in searched if name in result.training_texts)
        found = [result.training_texts.get(name, {}).get("scores", {}) for result in results.values()]
        for order in (order for order in ORDERS if any(order in scores for scores in found)):
            counts = dict.fromkeys(str(scores[order]["prompts"]) for scores in found if order in scores)
            cells = [_score(scores.get(order), metric) for scores in found]
            yield [name, order, metric, *cells, " / ".join(counts)]


def _score(scores: Mapping[str, Any] | None, metric: str) -> str:
    if scores is None:
        return "–"
    low, high = scores["intervals"][metric]
    return f"{scores['metrics'][metric]:.3f} [{low:.2f}, {high:.2f}]"


def work_table(work: Mapping[str, Work | None]) -> FittingTable:
    """What every run had done when it was evaluated last."""
    table = _table(
        WORK_COLUMNS,
        title="The work of each run",
        caption="FLOPs: useful ones, as MFU counts them; seconds: of the training steps",
    )
    for cells in work_lines(work):
        table.add_row(*cells)
    return table


def work_markdown(work: Mapping[str, Work | None]) -> str:
    """The same table as Markdown."""
    ruler = ["---"] + ["--:"] * (len(WORK_COLUMNS) - 1)
    return markdown_table([WORK_COLUMNS, ruler, *work_lines(work)])


def work_lines(work: Mapping[str, Work | None]) -> Iterator[list[str]]:
    first = next((done.flops for done in [*work.values()][:1] if done is not None), None)
    for label, done in work.items():
        if done is None:
            yield [label, *["–"] * (len(WORK_COLUMNS) - 1)]
            continue
        counts = [f"{count:,}" for count in (done.updates, done.rows, done.tokens)]
        flops = "–" if done.flops is None else f"{done.flops:.3g}"
        ratio = f"{done.flops / first:.3f}" if done.flops is not None and first else "–"
        yield [label, *counts, flops, ratio, f"{done.seconds:,.1f}"]


def difference_table(
    differences: Mapping[str, Mapping[str, Difference]], *, of: str, minus: str
) -> FittingTable:
    """Paired differences by task and metric, with 95 % intervals."""
    table = _table(
        ("task", "metric", "difference [95 % interval]", "prompts", "persons"),
        title=f"{of} minus {minus}, paired by prompt",
    )
    for cells in difference_lines(differences):
        table.add_row(*cells)
    return table


def difference_markdown(differences: Mapping[str, Mapping[str, Difference]], *, of: str, minus: str) -> str:
    """The same table as Markdown."""
    headers = ["task", "metric", f"{of} minus {minus}, paired by prompt", "prompts", "persons"]
    return markdown_table([headers, ["---"] * 2 + ["--:"] * 3, *difference_lines(differences)])


def difference_lines(differences: Mapping[str, Mapping[str, Difference]]) -> Iterator[list[str]]:
    for task, metrics in differences.items():
        for metric, found in metrics.items():
            low, high = found.interval
            score = f"{found.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            yield [task, metric, score, str(found.prompts), str(found.persons)]


def markdown_table(lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells as a table in Markdown; the second line is its ruler."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def choice_tables(choices: Mapping[str, Mapping[str, Any]]) -> Iterator[FittingTable]:
    """The log-probability tests, and their p-values: two tables that fit into 80 columns."""
    table = _table(
        ("task", "difference", "rank", "best", "nats/token"),
        title="Log-probability: the right answer against other persons'",
        caption="difference in nats, 95 % interval; best: how often it is the most probable (by chance 1 / candidates)",
    )
    for name, values in choices.items():
        low, high = values["intervals"]["difference"]
        table.add_row(
            name,
            f"{values['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
            f"{values['rank']:.2f} of {values['candidates']}",
            f"{values['forced_choice']:.3f}",
            f"{values['nll_per_token']:.3f}",
        )
    yield table
    tests = {"t_test": "t, over prompts", "ks_test": "KS, over prompts", "person_t_test": "t, over persons"}
    table = _table(("task", *tests.values()), title="p-values of the same; trust the last one")
    for name, values in choices.items():
        table.add_row(name, *(_p_value(values[test]) for test in tests))
    yield table


def _table(headers: Sequence[str], **options: Any) -> FittingTable:
    table = FittingTable(**options)
    for header in headers:
        is_text = header in _TEXT_COLUMNS
        table.add_column(header, right=not is_text and header not in _WORD_COLUMNS, whole=not is_text)
    return table


def score_table(
    before: Sequence[str],
    results: Mapping[str, EvaluationResult],
    after: Sequence[str],
    lines: Iterable[Sequence[str]],
    **options: Any,
) -> FittingTable:
    """A column of scores per model, between the others; where these models do not fit side by side, a row per model."""
    by_model = _table((*before, "run", "score", *after)) if len(results) > 1 else None
    table = _table((*before, *results, *after), instead=by_model, **options)
    for cells in lines:
        table.add_row(*cells)
        if by_model is None:
            continue
        keys, rest = cells[: len(before)], cells[len(cells) - len(after) :]
        for label, score in zip(results, cells[len(before) :], strict=False):
            by_model.add_row(*keys, label, score, *rest)
            keys, rest = [""] * len(keys), [""] * len(rest)
    return table


def _p_value(test: Mapping[str, Any] | None) -> str:
    return "–" if test is None or test["p_value"] is None else f"{test['p_value']:.0e}"


def retention_table(after: Mapping[str, Any], before: Mapping[str, Any]) -> FittingTable:
    """Perplexity on running texts, beside the base model's where that was measured on the same text, tokens and window."""
    headers = ("text", "tokens", "window", "perplexity\nbefore", "\nafter", "bits/byte\nbefore", "\nafter")
    table = _table(headers, title="Retention")
    for name, values in after.items():
        base = before.get(name)
        if base and any(base.get(key) != values[key] for key in ("text_sha256", "window", "tokens")):
            base = None
        table.add_row(
            name,
            str(values["tokens"]),
            str(values["window"]),
            f"{base['perplexity']:.3f}" if base else "–",
            f"{values['perplexity']:.3f}",
            f"{base['bits_per_byte']:.4f}" if base else "–",
            f"{values['bits_per_byte']:.4f}",
        )
    return table


def agreement_table(found: Mapping[str, Any]) -> FittingTable:
    """Agreement with the base's own greedy answers to instructions, with 95 % intervals."""
    table = _table(
        ("text", "measure", "figure [95 % interval]"),
        title="Agreement with the base's own answers",
        caption="over instructions; log-probabilities are of the base's answers, in nats per token",
    )
    for name, values in found.items():
        for measure, title in _AGREEMENT.items():
            low, high = values["intervals"][measure]
            table.add_row(name, title, f"{values[measure]:.3f} [{low:.3f}, {high:.3f}]")
            name = ""
    return table


def frontier_table(panel: Panel) -> FittingTable:
    """Score and perplexity of every model of a panel."""
    table = _table(HEADERS, title=f"{panel.task} ({panel.metric}) and the perplexity of {panel.text}")
    for cells in frontier_lines(panel):
        table.add_row(*cells)
    return table


def frontier_markdown(panel: Panel) -> str:
    """The same table as Markdown."""
    title = f"{panel.task} ({panel.metric}) and the perplexity of {panel.text}:\n\n"
    return title + markdown_table([HEADERS, ["---"] * 2 + ["--:"] * 3 + ["---"], *frontier_lines(panel)])


def _lines(results: Mapping[str, EvaluationResult]) -> Iterator[list[str]]:
    """By task: name, headline metric, a score for every model, floor, number of prompts (all, where models differ)."""
    for name in dict.fromkeys(name for result in results.values() for name in result.tasks):
        present = [result.tasks[name] for result in results.values() if name in result.tasks]
        metric = present[0].headline
        floors = [task.floors[metric] for task in present if metric in task.floors]
        yield [
            name,
            metric,
            *(_cell(result.tasks.get(name)) for result in results.values()),
            f"{floors[0]:.3f}" if floors else "–",
            " / ".join(dict.fromkeys(str(len(task.prompts) or "–") for task in present)),
        ]


def _cell(result: TaskResult | None) -> str:
    if result is None:
        return "–"
    if result.interval is None:
        return f"{result.score:.3f}"
    low, high = result.interval
    return f"{result.score:.3f} [{low:.2f}, {high:.2f}]"
