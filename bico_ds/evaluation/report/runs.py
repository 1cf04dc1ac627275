"""The runs of a comparison: final scores and curves, read from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.evaluation.results import EvaluationResult, TaskResult, load_result
from bico_ds.evaluation.scoring.metrics import METRICS
from bico_ds.evaluation.tasks.jsonl import parse_object
from bico_ds.runtime.run_folder import RunFolder

_PREFIX = "evaluation/"

Curve = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One column of the comparison. `curves`: (step, headline score) by task, in the order of steps."""

    label: str
    final: EvaluationResult
    curves: dict[str, Curve]


def load_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read run folders, or result files of `bico-ds evaluate`.

    A run's final scores are those of its last evaluation in `metrics.jsonl`; the result file of that step, where there is
    one, adds intervals, floors and answers. Raises `UserError` for a run that was never evaluated, a file that is neither,
    and a run that is named twice.
    """
    stems = [path.resolve().stem if path.is_file() else path.resolve().name for path in paths]
    labels = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if len(set(labels)) != len(labels):
        raise UserError(f"the same run is named twice: {', '.join(labels)}")
    return [_load_run(path, label) for path, label in zip(paths, labels, strict=True)]


def _load_run(path: Path, label: str) -> ComparedRun:
    if path.is_file():
        return ComparedRun(label=label, final=load_result(path), curves={})
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder or result file")
    folder = RunFolder(path)
    evaluations = _evaluations(folder.metrics_file)
    curves: dict[str, Curve] = {}
    for step, tasks in evaluations.items():
        for name, task in tasks.items():
            curves.setdefault(name, []).append((step, task.score))
    if not evaluations:
        raise UserError(
            f"{path}: no evaluation in {folder.metrics_file.name}; set 'evaluation.tasks' in the recipe, or evaluate the "
            "run's export with bico-ds evaluate and name the result file here"
        )
    last = max(evaluations)
    result_file = folder.evaluation_file(last)
    final = load_result(result_file) if result_file.is_file() else EvaluationResult(tasks=evaluations[last])
    return ComparedRun(label=label, final=final, curves=curves)


def _evaluations(metrics: Path) -> dict[int, dict[str, TaskResult]]:
    """Task results by step, in the order of steps. A resumed run may have written a step twice: the last one counts."""
    if not metrics.is_file():
        return {}
    found: dict[int, dict[str, TaskResult]] = {}
    try:
        text = metrics.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{metrics}: cannot be read as UTF-8 text: {error}") from error
    complete_lines = text.split("\n")[:-1]  # the last line may be half written
    for number, line in enumerate(complete_lines, start=1):
        record = parse_object(line, f"{metrics}:{number}")
        if record.get("kind") != "evaluation":
            continue
        try:
            found[int(record["step"])] = _task_results(record)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{metrics}:{number}: not an evaluation as a run writes it ({error!r})"
            ) from error
    return dict(sorted(found.items()))


def _task_results(record: dict[str, Any]) -> dict[str, TaskResult]:
    metrics: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        if key.startswith(_PREFIX) and key.count("/") == 2:
            _, task, metric = key.split("/")
            if metric in METRICS:
                metrics.setdefault(task, {})[metric] = float(value)
    return {
        task: TaskResult(headline="bleu" if "bleu" in values else "contains", metrics=values)
        for task, values in metrics.items()
    }
