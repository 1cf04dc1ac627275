"""Runs side by side, as tools/compare.py and the demo show them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bico_ds.evaluation.arms import load_arms
from bico_ds.evaluation.plots import plot_curves
from bico_ds.evaluation.tables import result_markdown, result_table


def compare_runs(runs: Sequence[Path], *, output: Path, console: Console | None = None) -> None:
    """Print the table of the tasks, and write comparison.md, .json and, where there are curves, .png to
    `output`.

    `runs`: run folders, or result files of tools/evaluate.py. Raises UserError for one that cannot be read.
    """
    console = console or Console()
    arms = load_arms(runs)
    results = {arm.label: arm.final for arm in arms}
    console.print(result_table(results))
    output.mkdir(parents=True, exist_ok=True)
    page, figures, picture = (output / f"comparison.{ending}" for ending in ("md", "json", "png"))
    page.write_text(result_markdown(results), encoding="utf-8")
    values = {
        arm.label: {"final": arm.final.to_json(rows=False)["tasks"], "curves": arm.curves} for arm in arms
    }
    figures.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    written = [page, figures]
    if any(arm.curves for arm in arms):
        plot_curves(arms, picture)
        written.append(picture)
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)
