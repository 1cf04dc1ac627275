"""comparison.csv: a row for every run and every group, a column for every metric."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from bico_ds.evaluation.report.groups.grouping import Member, differing_keys
from bico_ds.evaluation.report.groups.scores import GroupScores

_HEADLINE = "/headline"
_ABOUT = ("row", "name", "group", "runs", "seed", "step")
Row = dict[str, str]


def write_csv(groups: Sequence[GroupScores], output: Path) -> Path:
    """Write comparison.csv, with the columns row (`run` or `group`), name, group, runs, seed, step, settings and metrics.

    Settings are the recipes' keys that differ between runs. A metric is the run's value, or the mean of the group, which
    also has METRIC/sd, /lowest and /highest over its runs; of headline scores METRIC/low and /high are the ends of the 95 %
    interval. A group of one run has no row of its own. What is not known is empty.
    """
    keys = differing_keys([member for group in groups for member in group.group.members])
    rows = [row for group in groups for row in _rows(group, keys)]
    columns = [*_ABOUT, *keys, *_in_order({name for row in rows for name in row} - {*_ABOUT, *keys})]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = output / "comparison.csv"
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def _in_order(columns: set[str]) -> list[str]:
    """Every metric before what belongs to it."""
    ends = ("low", "high", "sd", "lowest", "highest")

    def order(column: str) -> tuple[str, int]:
        metric, _, end = column.rpartition("/")
        return (metric, 1 + ends.index(end)) if metric in columns and end in ends else (column, 0)

    return sorted(columns, key=order)


def _rows(group: GroupScores, keys: Sequence[str]) -> Iterator[Row]:
    members = group.group.members
    for member in members:
        yield _run_row(member, group.label, keys)
    if len(members) == 1:
        return
    row = {"row": "group", "name": group.label, "group": group.label, "runs": str(len(members))}
    for key in keys:
        values = {member.recipe.get(key, "") for member in members}
        row[key] = values.pop() if len(values) == 1 else ""
    for metric in dict.fromkeys(name for run in group.runs for name in run.numbers):
        spread = group.spread(metric)
        if spread is None:
            continue
        row[metric] = _written(spread.mean)
        row |= {f"{metric}/lowest": _written(spread.lowest), f"{metric}/highest": _written(spread.highest)}
        row |= {f"{metric}/sd": _written(spread.sd)} if spread.sd is not None else {}
        if (
            metric.endswith(_HEADLINE)
            and (found := group.interval(metric.removesuffix(_HEADLINE))) is not None
        ):
            row |= {f"{metric}/low": _written(found[0]), f"{metric}/high": _written(found[1])}
    yield row


def _run_row(member: Member, group: str, keys: Sequence[str]) -> Row:
    run = member.run
    row = {"row": "run", "name": run.label, "group": group, "runs": "1", "seed": member.seed}
    row["step"] = "" if run.step is None else str(run.step)
    row |= {key: member.recipe.get(key, "") for key in keys}
    row |= {metric: _written(value) for metric, value in run.numbers.items()}
    for name, task in run.final.tasks.items():
        if (found := task.interval) is not None:
            row |= {
                f"{name}{_HEADLINE}/low": _written(found[0]),
                f"{name}{_HEADLINE}/high": _written(found[1]),
            }
    return row


def _written(value: float) -> str:
    return f"{value:.6g}"
