"""Compare runs: the table, the pictures and the files that `bico-ds compare` and the demo write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bico_ds.common.errors import UserError
from bico_ds.evaluation.report.frontier import Panel, panels
from bico_ds.evaluation.report.paired import Difference, paired_differences, same_prompts
from bico_ds.evaluation.report.plots import plot_curves, plot_frontier, plot_scores
from bico_ds.evaluation.report.runs import ComparedRun, Work, load_runs
from bico_ds.evaluation.report.tables import (
    console_for_tables,
    contamination_markdown,
    contamination_table,
    difference_markdown,
    difference_table,
    frontier_markdown,
    frontier_table,
    result_markdown,
    result_table,
    work_markdown,
    work_table,
)
from bico_ds.evaluation.results import TaskResult


def compare_runs(
    paths: Sequence[Path],
    *,
    output: Path,
    task: str | None = None,
    text: str | None = None,
    console: Console | None = None,
) -> None:
    """Print the tables of the tasks and of the work, and every later run minus the first, paired by prompt.

    `paths`: run folders, or result files of `bico-ds evaluate`. Writes comparison.md, comparison.json, scores.png and, where
    there are curves, curves.png to `output`; where a perplexity is known, frontier.png, of `task` (None: `frontier.TASK`)
    and all texts, or `text`. Raises `UserError` for a run that cannot be read, for a task whose headline metric is not the
    same in all runs, for a `task` or `text` that no run has, and where no folder can be made at `output`.
    """
    console = console or console_for_tables()
    runs = load_runs(paths)
    check_comparable(runs)
    frontier = panels(runs, task=task, text=text)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: no folder can be made there ({error})") from error
    differences = {run.label: _differences(runs[0], run) for run in runs[1:]}
    _show(runs, differences, frontier, console)
    written = [_write_page(runs, differences, frontier, output), _write_figures(runs, differences, output)]
    plot_scores(runs, output / "scores.png")
    written.append(output / "scores.png")
    if any(run.curves for run in runs):
        plot_curves(runs, output / "curves.png")
        written.append(output / "curves.png")
    if frontier:
        plot_frontier(frontier, output / "frontier.png")
        written.append(output / "frontier.png")
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True, markup=False)


Differences = Mapping[str, Mapping[str, Difference]]  # by task and metric


def _differences(first: ComparedRun, second: ComparedRun) -> Differences:
    both = [name for name in first.final.tasks if name in second.final.tasks]
    pairs = {name: paired_differences(first.final.tasks[name], second.final.tasks[name]) for name in both}
    return {name: found for name, found in pairs.items() if found}


def _show(
    runs: Sequence[ComparedRun],
    differences: Mapping[str, Differences],
    frontier: Sequence[Panel],
    console: Console,
) -> None:
    results = {run.label: run.final for run in runs}
    console.print(result_table(results))
    if (work := _work(runs)) is not None:
        console.print(work_table(work))
    if any(result.training_texts for result in results.values()):
        console.print(contamination_table(results))
    for label, found in differences.items():
        if found:
            console.print(difference_table(found, of=label, minus=runs[0].label))
    for panel in frontier:
        console.print(frontier_table(panel))
    for remark in remarks(runs):
        console.print(f"note: {remark}", soft_wrap=True, highlight=False, markup=False)


def _work(runs: Sequence[ComparedRun]) -> dict[str, Work | None] | None:
    """The work of every run; None where that of none is known."""
    work = {run.label: run.work for run in runs}
    return work if any(work.values()) else None


def _write_page(
    runs: Sequence[ComparedRun],
    differences: Mapping[str, Differences],
    frontier: Sequence[Panel],
    output: Path,
) -> Path:
    results = {run.label: run.final for run in runs}
    sections = [result_markdown(results)]
    if (work := _work(runs)) is not None:
        sections.append(work_markdown(work))
    if any(result.training_texts for result in results.values()):
        sections.append(contamination_markdown(results))
    sections += [
        difference_markdown(found, of=label, minus=runs[0].label)
        for label, found in differences.items()
        if found
    ]
    sections += map(frontier_markdown, frontier)
    sections += [f"- {remark}\n" for remark in remarks(runs)]
    page = output / "comparison.md"
    page.write_text("\n".join(sections), encoding="utf-8")
    return page


def _write_figures(runs: Sequence[ComparedRun], differences: Mapping[str, Differences], output: Path) -> Path:
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        final = run.final.to_json(prompts=False)
        values[run.label] = {"final": final["tasks"], "curves": run.curves}
        if run.work is not None:
            values[run.label]["work"] = run.work._asdict()
        if run.texts:
            values[run.label]["texts"] = {
                text: [{"step": step, **figure._asdict()} for step, figure in figures.items()]
                for text, figures in run.texts.items()
            }
        if "training_texts" in final:
            values[run.label]["training_texts"] = final["training_texts"]
    for label, tasks in differences.items():
        values[label]["minus"] = {
            runs[0].label: {
                task: {metric: asdict(found) for metric, found in metrics.items()}
                for task, metrics in tasks.items()
            }
        }
    figures = output / "comparison.json"
    figures.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def remarks(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """What was not the same in a run as in the first: other prompts, other rules, another number of new tokens."""
    first = runs[0]
    for run in runs[1:]:
        for name in (name for name in run.final.tasks if name in first.final.tasks):
            ours, theirs = first.final.tasks[name], run.final.tasks[name]
            if ours.prompts and theirs.prompts and not same_prompts(ours, theirs):
                counts = f"{len(ours.prompts)} in {first.label}, {len(theirs.prompts)} in {run.label}"
                yield f"{name}: not the same prompts ({counts}): the scores are of different questions"
            if ours.scoring != theirs.scoring and not (_is_ascii(ours) and _is_ascii(theirs)):
                yield (
                    f"{name}: scored by the rules of version {ours.scoring} in {first.label}, {theirs.scoring} in "
                    f"{run.label}, which compare texts beyond ASCII differently: evaluate the older one again"
                )
            if ours.new_tokens and theirs.new_tokens and ours.new_tokens != theirs.new_tokens:
                yield (
                    f"{name}: up to {ours.new_tokens} new tokens in {first.label}, {theirs.new_tokens} in "
                    f"{run.label}: the longer an answer, the more it can contain"
                )


def _is_ascii(result: TaskResult) -> bool:
    """Whether all texts that were compared are ASCII, where the result holds them."""
    return all((x["answer"] + x.get("prediction", "")).isascii() for x in result.prompts)


def check_comparable(runs: Sequence[ComparedRun]) -> None:
    """Raise `UserError` where a task has not the same headline metric in all runs: other questions were asked."""
    first: dict[str, tuple[str, str]] = {}
    for run in runs:
        for name, task in run.final.tasks.items():
            metric, label = first.setdefault(name, (task.headline, run.label))
            if metric != task.headline:
                raise UserError(
                    f"task '{name}' is scored by {metric} in {label} and by {task.headline} in {run.label}: "
                    "they were asked different questions and cannot stand side by side"
                )
