"""Tables of groups of runs, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bico_ds.common.terminal.fitting_table import FittingTable
from bico_ds.evaluation.report.groups.scores import GroupScores, Spread
from bico_ds.evaluation.report.paired import Difference
from bico_ds.evaluation.report.tables import difference_markdown, difference_table, markdown_table
from bico_ds.evaluation.report.wording import metric_name, title_of

_SCORES = ("group", "runs", "mean [95 % interval]", "sd", "lowest to highest")
_NUMBERS = ("metric", "group", "runs", "mean", "sd", "lowest to highest")
_TEXT_COLUMNS = ("metric", "group")
_CAPTION = (
    "95 %: over persons and runs; sd, lowest to highest: over runs. With 2 or 3 runs that differ much, the interval is too "
    "narrow: see lowest to highest"
)
_SHOWN_NUMBERS = ("text/", "held_out/")


def group_tables(groups: Sequence[GroupScores], chosen: str | None = None) -> Iterator[FittingTable]:
    """A table for each task, one of the other metrics, and the differences of every later group from the first.

    `chosen`: a metric that is shown, too.
    """
    names = _task_names(groups)
    for name in names:
        yield _table(
            _SCORES, _score_lines(groups, name), _title(groups, name), _CAPTION if name == names[-1] else ""
        )
    if lines := list(_number_lines(groups, chosen)):
        yield _table(_NUMBERS, lines, "Other metrics")
    for label, found in differences(groups).items():
        yield difference_table(found, of=label, minus=groups[0].label)


def group_markdown(groups: Sequence[GroupScores], chosen: str | None = None) -> Iterator[str]:
    """The same as Markdown, each table with its heading."""
    yield f"## Groups of runs\n\n{_CAPTION}\n"
    for name in _task_names(groups):
        yield f"{_title(groups, name)}:\n\n{_markdown(_SCORES, _score_lines(groups, name))}"
    if lines := list(_number_lines(groups, chosen)):
        yield f"Other metrics, over runs:\n\n{_markdown(_NUMBERS, lines)}"
    for label, found in differences(groups).items():
        yield difference_markdown(found, of=label, minus=groups[0].label)


def differences(groups: Sequence[GroupScores]) -> Mapping[str, Mapping[str, Mapping[str, Difference]]]:
    """The mean headline scores of every later group less those of the first, by group, task and metric."""
    found: dict[str, Mapping[str, Mapping[str, Difference]]] = {}
    for group in groups[1:]:
        tasks = {
            name: {task[0].headline: gain}
            for name in _task_names(groups)
            if (task := group.tasks(name)) and (gain := group.minus(groups[0], name)) is not None
        }
        if tasks:
            found[group.label] = tasks
    return found


def _task_names(groups: Sequence[GroupScores]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for run in group.runs for name in run.final.tasks))


def _title(groups: Sequence[GroupScores], name: str) -> str:
    metric = next(tasks[0].headline for group in groups if (tasks := group.tasks(name)))
    title = title_of(name)
    return f"{title} ({metric_name(metric)})" if title == name else f"{title} ({name}, {metric_name(metric)})"


def _score_lines(groups: Sequence[GroupScores], name: str) -> Iterator[list[str]]:
    for group in groups:
        spread, interval = group.spread(f"{name}/headline"), group.interval(name)
        if spread is None:
            yield [group.label, "0", *["–"] * 3]
            continue
        within = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval is not None else ""
        yield [group.label, str(spread.runs), f"{spread.mean:.3f}{within}", *_over_runs(spread)]


def _number_lines(groups: Sequence[GroupScores], chosen: str | None) -> Iterator[list[str]]:
    metrics = dict.fromkeys(
        metric
        for group in groups
        for run in group.runs
        for metric in run.numbers
        if metric.startswith(_SHOWN_NUMBERS) or (metric == chosen and not metric.endswith("/headline"))
    )
    for metric in metrics:
        called = metric
        for group in groups:
            if (spread := group.spread(metric)) is not None:
                yield [
                    called,
                    group.label,
                    str(spread.runs),
                    f"{spread.mean:.4g}",
                    *_over_runs(spread, ".4g"),
                ]
                called = ""


def _over_runs(spread: Spread, how: str = ".3f") -> list[str]:
    if spread.sd is None:
        return ["–", "–"]
    return [f"{spread.sd:{how}}", f"{spread.lowest:{how}} to {spread.highest:{how}}"]


def _table(
    headers: Sequence[str], lines: Iterator[list[str]] | list[list[str]], title: str, caption: str = ""
) -> FittingTable:
    table = FittingTable(title=title, caption=caption)
    for header in headers:
        table.add_column(header, right=header not in _TEXT_COLUMNS, whole=header not in _TEXT_COLUMNS)
    for cells in lines:
        table.add_row(*cells)
    return table


def _markdown(headers: Sequence[str], lines: Iterator[list[str]] | list[list[str]]) -> str:
    ruler = ["---" if header in _TEXT_COLUMNS else "--:" for header in headers]
    return markdown_table([headers, ruler, *lines])
