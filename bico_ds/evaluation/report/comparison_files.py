"""The files of a comparison: the page in Markdown, the figures in JSON, the pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bico_ds.evaluation.report.frontier import Panel
from bico_ds.evaluation.report.paired import Difference
from bico_ds.evaluation.report.plots import plot_curves
from bico_ds.evaluation.report.runs import ComparedRun
from bico_ds.evaluation.report.score_plots import plot_frontier, plot_scores


def write_page(sections: Sequence[str], output: Path) -> Path:
    page = output / "comparison.md"
    page.write_text("\n".join(sections), encoding="utf-8")
    return page


def write_figures(
    runs: Sequence[ComparedRun],
    differences: Mapping[str, Mapping[str, Mapping[str, Difference]]],
    output: Path,
    *,
    first: str,
) -> Path:
    """Of every run its scores, curves, work, texts, and its `differences` from the run `first` by task and metric."""
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
            first: {
                task: {metric: asdict(found) for metric, found in metrics.items()}
                for task, metrics in tasks.items()
            }
        }
    figures = output / "comparison.json"
    figures.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def draw_pictures(
    runs: Sequence[ComparedRun],
    frontier: Sequence[Panel],
    output: Path,
    *,
    formats: Sequence[str],
    bands: str,
    single: Sequence[Mapping[str, Sequence[float]]],
) -> Iterator[Path]:
    """Draw scores, and curves and the frontier where there are any; `bands`, `single`: as the plots have them."""
    for format in formats:
        plot_scores(runs, path := output / f"scores.{format}", single=single)
        yield path
        if any(run.curves for run in runs):
            plot_curves(runs, path := output / f"curves.{format}", format=format, bands=bands)
            yield path
        if frontier:
            plot_frontier(frontier, path := output / f"frontier.{format}")
            yield path
