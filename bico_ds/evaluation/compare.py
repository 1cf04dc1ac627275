"""Runs side by side, as tools/compare.py and the demo show them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bico_ds.config.errors import UserError
from bico_ds.evaluation.arms import Arm, load_arms
from bico_ds.evaluation.plots import plot_curves, plot_scores
from bico_ds.evaluation.tables import result_markdown, result_table


def compare_runs(runs: Sequence[Path], *, output: Path, console: Console | None = None) -> None:
    """Print the table of the tasks, and write comparison.md, comparison.json, scores.png and, where there are
    curves, curves.png to `output`.

    `runs`: run folders, or result files of tools/evaluate.py. Raises UserError for one that cannot be read.
    """
    console = console or Console()
    arms = load_arms(runs)
    _check_comparable(arms)
    results = {arm.label: arm.final for arm in arms}
    console.print(result_table(results))
    output.mkdir(parents=True, exist_ok=True)
    page, figures = output / "comparison.md", output / "comparison.json"
    page.write_text(result_markdown(results), encoding="utf-8")
    values = {
        arm.label: {"final": arm.final.to_json(rows=False)["tasks"], "curves": arm.curves} for arm in arms
    }
    figures.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    bars, curves = output / "scores.png", output / "curves.png"
    plot_scores(arms, bars)
    written = [page, figures, bars]
    if any(arm.curves for arm in arms):
        plot_curves(arms, curves)
        written.append(curves)
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


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
