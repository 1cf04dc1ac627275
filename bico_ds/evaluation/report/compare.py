"""Runs side by side, as tools/compare.py and the demo show them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bico_ds.common.errors import UserError
from bico_ds.evaluation.report.paired import Difference, paired_differences, same_prompts
from bico_ds.evaluation.report.plots import plot_curves, plot_scores
from bico_ds.evaluation.report.runs import Arm, load_arms
from bico_ds.evaluation.report.tables import (
    console_for_tables,
    difference_markdown,
    difference_table,
    result_markdown,
    result_table,
)


def compare_runs(runs: Sequence[Path], *, output: Path, console: Console | None = None) -> None:
    """Print the table of the tasks, and every later run minus the first, paired by prompt. Write comparison.md,
    comparison.json, scores.png and, where there are curves, curves.png to `output`.

    `runs`: run folders, or result files of tools/evaluate.py. Raises UserError for one that cannot be read, for a task
    with another headline metric in one of them, and where no folder can be made at `output`.
    """
    console = console or console_for_tables()
    arms = load_arms(runs)
    _check_comparable(arms)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: no folder can be made there ({error})") from error
    differences = {arm.label: _differences(arms[0], arm) for arm in arms[1:]}
    _show(arms, differences, console)
    written = [_write_page(arms, differences, output), _write_figures(arms, differences, output)]
    plot_scores(arms, output / "scores.png")
    written.append(output / "scores.png")
    if any(arm.curves for arm in arms):
        plot_curves(arms, output / "curves.png")
        written.append(output / "curves.png")
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


Differences = Mapping[str, Mapping[str, Difference]]  # by task and metric


def _differences(first: Arm, second: Arm) -> Differences:
    both = [name for name in first.final.tasks if name in second.final.tasks]
    pairs = {name: paired_differences(first.final.tasks[name], second.final.tasks[name]) for name in both}
    return {name: found for name, found in pairs.items() if found}


def _show(arms: Sequence[Arm], differences: Mapping[str, Differences], console: Console) -> None:
    console.print(result_table({arm.label: arm.final for arm in arms}))
    for label, found in differences.items():
        if found:
            console.print(difference_table(found, of=label, minus=arms[0].label))
    for remark in remarks(arms):
        console.print(f"note: {remark}", soft_wrap=True, highlight=False, markup=False)


def _write_page(arms: Sequence[Arm], differences: Mapping[str, Differences], output: Path) -> Path:
    sections = [result_markdown({arm.label: arm.final for arm in arms})]
    sections += [
        difference_markdown(found, of=label, minus=arms[0].label)
        for label, found in differences.items()
        if found
    ]
    sections += [f"- {remark}\n" for remark in remarks(arms)]
    page = output / "comparison.md"
    page.write_text("\n".join(sections), encoding="utf-8")
    return page


def _write_figures(arms: Sequence[Arm], differences: Mapping[str, Differences], output: Path) -> Path:
    values: dict[str, dict[str, Any]] = {
        arm.label: {"final": arm.final.to_json(rows=False)["tasks"], "curves": arm.curves} for arm in arms
    }
    for label, tasks in differences.items():
        values[label]["minus"] = {
            arms[0].label: {
                task: {metric: asdict(found) for metric, found in metrics.items()}
                for task, metrics in tasks.items()
            }
        }
    figures = output / "comparison.json"
    figures.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def remarks(arms: Sequence[Arm]) -> Iterator[str]:
    """What was not the same for an arm as for the first: other prompts, another number of new tokens."""
    first = arms[0]
    for arm in arms[1:]:
        for name in (name for name in arm.final.tasks if name in first.final.tasks):
            ours, theirs = first.final.tasks[name], arm.final.tasks[name]
            if ours.rows and theirs.rows and not same_prompts(ours, theirs):
                counts = f"{len(ours.rows)} in {first.label}, {len(theirs.rows)} in {arm.label}"
                yield f"{name}: not the same prompts ({counts}): the scores are of different questions"
            if ours.new_tokens and theirs.new_tokens and ours.new_tokens != theirs.new_tokens:
                yield (
                    f"{name}: up to {ours.new_tokens} new tokens in {first.label}, {theirs.new_tokens} in "
                    f"{arm.label}: the longer an answer, the more it can contain"
                )


def _check_comparable(arms: Sequence[Arm]) -> None:
    """UserError where a task has another headline metric in another arm: they were asked other questions."""
    first: dict[str, tuple[str, str]] = {}
    for arm in arms:
        for name, task in arm.final.tasks.items():
            metric, label = first.setdefault(name, (task.headline, arm.label))
            if metric != task.headline:
                raise UserError(
                    f"task '{name}' is scored by {metric} in {label} and by {task.headline} in {arm.label}: "
                    "they were asked different questions and cannot stand side by side"
                )
