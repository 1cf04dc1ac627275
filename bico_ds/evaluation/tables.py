"""Results side by side, for the terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from bico_ds.evaluation.suite import EvaluationResult, TaskResult

_QUESTIONS = {
    "n2d": "name → description",
    "d2n": "description → name",
    "n2d_reverse": "description → name",
    "d2n_reverse": "name → description",
}


def result_table(results: Mapping[str, EvaluationResult], *, title: str = "Reversal tasks") -> Table:
    """The headline metric of every task with its 95 % interval, one column a model."""
    table = Table(title=title)
    for header in ("task", "question", "metric"):
        table.add_column(header)
    for label in (*results, "floor"):
        table.add_column(label, justify="right")
    for cells in _lines(results):
        table.add_row(*(cell.replace("[", "\\[") for cell in cells))
    return table


def result_markdown(results: Mapping[str, EvaluationResult]) -> str:
    """The same table as Markdown."""
    headers = ["task", "question", "metric", *results, "floor"]
    ruler = ["---"] * 3 + ["--:"] * (len(results) + 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, ruler, *_lines(results))) + "\n"


def _lines(results: Mapping[str, EvaluationResult]) -> Iterator[list[str]]:
    for name in dict.fromkeys(name for result in results.values() for name in result.tasks):
        present = [result.tasks[name] for result in results.values() if name in result.tasks]
        metric = present[0].headline
        floors = [task.floors[metric] for task in present if metric in task.floors]
        yield [
            name,
            _QUESTIONS.get(name, ""),
            metric,
            *(_cell(result.tasks.get(name)) for result in results.values()),
            f"{floors[0]:.3f}" if floors else "–",
        ]


def _cell(result: TaskResult | None) -> str:
    if result is None:
        return "–"
    if result.headline not in result.intervals:
        return f"{result.score:.3f}"
    low, high = result.intervals[result.headline]
    return f"{result.score:.3f} [{low:.2f}, {high:.2f}]"
