"""Compare runs: the table, the pictures and the files that `bico-ds compare` and the demo write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from bico_ds.common.errors import UserError
from bico_ds.evaluation.report.comparison_files import draw_pictures, write_figures, write_page
from bico_ds.evaluation.report.found_runs import expanded
from bico_ds.evaluation.report.frontier import Panel, panels
from bico_ds.evaluation.report.groups.csv_file import write_csv
from bico_ds.evaluation.report.groups.grouping import alone, group_remarks, grouped, members_of
from bico_ds.evaluation.report.groups.scores import GroupScores
from bico_ds.evaluation.report.groups.tables import group_markdown, group_tables
from bico_ds.evaluation.report.held_out import has_losses, loss_markdown, loss_remarks, loss_table
from bico_ds.evaluation.report.metric_keys import chosen_metric, less_is_better
from bico_ds.evaluation.report.paired import Difference, paired_differences, same_prompts
from bico_ds.evaluation.report.runs import ComparedRun, Work, labels_of, load_run
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

Shown = TypeVar("Shown", ComparedRun, GroupScores)
Differences = Mapping[str, Mapping[str, Difference]]  # by task and metric


@dataclass(frozen=True, kw_only=True)
class View:
    """How runs are shown.

    `by`: keys of recipes; runs with the same values are a group. Empty: runs of the same recipe but for the seed are one.
    `ungrouped`: each run stands alone. `sort`: the metric by which runs and groups are ordered, the best first; None: as
    they were named. `formats`: of pictures, out of `plots.FORMATS`.
    """

    by: Sequence[str] = ()
    ungrouped: bool = False
    sort: str | None = None
    formats: Sequence[str] = ("png",)


def compare_runs(
    paths: Sequence[Path],
    *,
    output: Path,
    task: str | None = None,
    text: str | None = None,
    brief: bool = False,
    view: View | None = None,
    console: Console | None = None,
) -> None:
    """Print the tables of the tasks and of the work, and every later run minus the first, paired by prompt.

    Of runs that repeat one another with other seeds, or where `view` has keys, tables and pictures are of groups of runs.
    `brief`: prints the table of the tasks alone, and no names of files. `paths`: run folders, folders of them, or result
    files of `bico-ds evaluate`. Writes comparison.md, comparison.json, comparison.csv, scores.png and, where there are
    curves, curves.png to `output`; where a perplexity is known, frontier.png, of `task` (None: `frontier.TASK`) and all
    texts, or `text`. Raises `UserError` for a run that cannot be read, for a task whose headline metric is not the same in
    all runs, for a `task`, `text`, key or metric that no run has, and where no folder can be made at `output`.
    """
    console, view = console or console_for_tables(), view or View()
    compared = _compared(paths, view, task=task, text=text)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: no folder can be made there ({error})") from error
    if brief:
        console.print(result_table({run.label: run.final for run in compared.runs}))
    else:
        compared.show(console)
    written = compared.write(output, view.formats)
    if not brief:
        console.print("written: " + ", ".join(map(str, written)), soft_wrap=True, markup=False)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """All that is shown and written.

    `runs` and `groups`: in the order in which they are shown, by the `metric`, if any. `drawn`: the groups as runs where
    `in_groups`, with `bands` of that meaning, else the runs. `differences`: of each other run from the one called `first`.
    """

    runs: Sequence[ComparedRun]
    groups: Sequence[GroupScores]
    in_groups: bool
    metric: str | None
    drawn: Sequence[ComparedRun]
    bands: str
    frontier: Sequence[Panel]
    first: str
    differences: Mapping[str, Differences]
    notes: Sequence[str]

    def show(self, console: Console) -> None:
        if self.in_groups:
            for table in (*group_tables(self.groups, self.metric), *map(frontier_table, self.frontier)):
                console.print(table)
        else:
            _show(self.runs, self.differences, self.frontier, console, first=self.first)
        for note in self.notes:
            console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)

    def write(self, output: Path, formats: Sequence[str]) -> list[Path]:
        """Write all files into this folder, and return their paths."""
        sections = _sections(self.runs, self.differences, self.frontier, self.notes, first=self.first)
        if self.in_groups:
            sections = [*group_markdown(self.groups, self.metric), "## Every run\n", *sections]
        single = [group.single_scores for group in self.groups] if self.in_groups else []
        return [
            write_page(sections, output),
            write_figures(self.runs, self.differences, output, first=self.first),
            write_csv(self.groups, output),
            *draw_pictures(
                self.drawn, self.frontier, output, formats=formats, bands=self.bands, single=single
            ),
        ]


def _compared(paths: Sequence[Path], view: View, *, task: str | None, text: str | None) -> _Compared:
    """Read and group the runs. Raises `UserError` as `compare_runs` does."""
    places, named, notes = _found(paths)
    check_comparable(named)
    metric = _sorted_by(named, view)
    members = members_of(named, places)
    of = alone(members) if view.ungrouped else grouped(members, view.by)
    in_groups = bool(view.by) or len(of) < len(named)
    runs, groups = _in_order(named, metric), _in_order([GroupScores(group) for group in of], metric)
    drawn, bands = _as_runs(groups) if in_groups else (runs, "")
    first = named[0]
    return _Compared(
        runs=runs,
        groups=groups,
        in_groups=in_groups,
        metric=metric,
        drawn=drawn,
        bands=bands,
        frontier=panels(drawn, task=task, text=text),
        first=first.label,
        differences={run.label: _differences(first, run) for run in runs if run is not first},
        notes=[*notes, *(group_remarks(of) if in_groups else ()), *remarks(named)],
    )


def _as_runs(groups: Sequence[GroupScores]) -> tuple[list[ComparedRun], str]:
    """The groups for pictures, and what their bands are."""
    of_intervals = all(group.has_bands_of_intervals for group in groups)
    bands = "95 % intervals over persons and runs" if of_intervals else "lowest to highest run"
    return [group.as_run(bands_of_intervals=of_intervals) for group in groups], bands


def _found(paths: Sequence[Path]) -> tuple[list[Path], list[ComparedRun], list[str]]:
    """The runs that these paths name, and where they are; what was left out of folders of runs, in words.

    Raises `UserError` as `load_run` does, but for a run in a folder of runs: that one is left out.
    """
    places = list(expanded(paths))
    labels = labels_of([path for path, _ in places])
    found: list[tuple[Path, ComparedRun]] = []
    left_out = []
    for (path, is_one_of_many), label in zip(places, labels, strict=True):
        try:
            found.append((path, load_run(path, label)))
        except UserError as error:
            if not is_one_of_many:
                raise
            left_out.append(f"left out: {error}")
    if not found:
        raise UserError(f"no run in {', '.join(map(str, paths))} can be compared; {'; '.join(left_out[:3])}")
    return [path for path, _ in found], [run for _, run in found], left_out


def _sorted_by(runs: Sequence[ComparedRun], view: View) -> str | None:
    if view.sort is None:
        return None
    return chosen_metric("--sort", view.sort, (metric for run in runs for metric in run.numbers))


def _in_order(shown: Sequence[Shown], metric: str | None) -> list[Shown]:
    """The best first; those that have not the metric last."""
    if metric is None:
        return list(shown)
    sign = 1 if less_is_better(metric) else -1

    def place(of: Shown) -> float:
        value = of.mean(metric)
        return float("inf") if value is None else sign * value

    return sorted(shown, key=place)


def _differences(first: ComparedRun, second: ComparedRun) -> Differences:
    both = [name for name in first.final.tasks if name in second.final.tasks]
    pairs = {name: paired_differences(first.final.tasks[name], second.final.tasks[name]) for name in both}
    return {name: found for name, found in pairs.items() if found}


def _show(
    runs: Sequence[ComparedRun],
    differences: Mapping[str, Differences],
    frontier: Sequence[Panel],
    console: Console,
    *,
    first: str = "",
) -> None:
    results = {run.label: run.final for run in runs}
    console.print(result_table(results))
    if (work := _work(runs)) is not None:
        console.print(work_table(work))
    if any(result.training_texts for result in results.values()):
        console.print(contamination_table(results))
    if has_losses(results):
        console.print(loss_table(results))
    for label, found in differences.items():
        if found:
            console.print(difference_table(found, of=label, minus=first))
    for panel in frontier:
        console.print(frontier_table(panel))


def _work(runs: Sequence[ComparedRun]) -> dict[str, Work | None] | None:
    """The work of every run; None where that of none is known."""
    work = {run.label: run.work for run in runs}
    return work if any(work.values()) else None


def _sections(
    runs: Sequence[ComparedRun],
    differences: Mapping[str, Differences],
    frontier: Sequence[Panel],
    notes: Sequence[str],
    *,
    first: str,
) -> list[str]:
    """The same as `_show`, as Markdown."""
    results = {run.label: run.final for run in runs}
    sections = [result_markdown(results)]
    if (work := _work(runs)) is not None:
        sections.append(work_markdown(work))
    if any(result.training_texts for result in results.values()):
        sections.append(contamination_markdown(results))
    if has_losses(results):
        sections.append(loss_markdown(results))
    sections += [
        difference_markdown(found, of=label, minus=first) for label, found in differences.items() if found
    ]
    sections += map(frontier_markdown, frontier)
    return [*sections, *(f"- {note}\n" for note in notes)]


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
        yield from loss_remarks((first.label, first.final), (run.label, run.final))


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
