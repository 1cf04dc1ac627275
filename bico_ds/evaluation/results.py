"""Result records: the scores of one model, and the files that hold them. Imports no torch: a comparison needs none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.evaluation.result_checks import (
    check_losses,
    check_perplexities,
    check_tasks,
    check_training_texts,
)
from bico_ds.evaluation.scoring.statistics import unanimous_interval


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task's scores, all in 0 … 1.

    `headline`: the metric that tables and plots show. `intervals`: 95 %, persons resampled. `floors`: the scores of another
    person's answer. `new_tokens`: how many an answer could have (0: not known). `scoring`: the version of the rules by which
    texts were compared (`metrics.SCORING_VERSION`); a file without it has 1. `prompts`: every prompt with its prediction and
    scores; in the result file their key is `rows`.
    """

    headline: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    new_tokens: int = 0
    scoring: int = 1
    prompts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def score(self) -> float:
        return self.metrics[self.headline]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the score, 95 %, over persons: exact where no resample differs from another; None where it is not known."""
        persons = len({prompt["group"] for prompt in self.prompts})
        if persons and self.score in (0.0, 1.0):
            return unanimous_interval(self.score, persons)
        return self.intervals.get(self.headline)


Order = Literal["same", "reverse", "both", "neither"]
# What the training texts hold of a question: what it asks about and then its answer, the other way round, both, or neither.
ORDERS: tuple[Order, ...] = ("same", "reverse", "both", "neither")

# Of a result file, besides `tasks`; one that is empty is left out.
_SECTIONS = ("choice", "training_texts", "texts", "held_out")

CHOICE_SCALARS = ("difference", "rank", "forced_choice", "nll")


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Results by task name, in the order asked for.

    `choice`: log-probability tests (`choice_statistics`) by task name, where they were asked for. `training_texts`: what the
    training texts hold of each question (`contamination.apart`) by task name, where they were searched. `texts`: the
    perplexities (`retention_texts.measure`) by the name of a text. `held_out`: losses (`held_out.loss.measure`) by the
    names of a held-out store and an objective.
    """

    tasks: dict[str, TaskResult]
    choice: dict[str, dict[str, Any]] = field(default_factory=dict)
    training_texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    held_out: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def scalars(self, prefix: str = "evaluation") -> dict[str, float]:
        """Every score by its tag, `{prefix}/{task}/{metric}`; headlines by order as `{prefix}/{task}/{order}/{metric}`.

        Of texts `{prefix}/text/{name}/perplexity` and `times_base`, of held-out stores
        `{prefix}/held_out/{name}/{objective}`, as far as they are known and finite.
        """
        figures = [(task, name, value) for task, x in self.tasks.items() for name, value in x.metrics.items()]
        figures += [(task, name, x[name]) for task, x in self.choice.items() for name in CHOICE_SCALARS]
        for task, x in self.training_texts.items():
            headline = self.tasks[task].headline
            figures += [
                (task, f"{order}/{headline}", y["metrics"][headline]) for order, y in x["scores"].items()
            ]
        for name, x in self.texts.items():
            figures += [(f"text/{name}", "perplexity", x["perplexity"])]
            figures += [(f"text/{name}", "times_base", x["times"])] if x.get("times") is not None else []
        for name, losses in self.held_out.items():
            figures += [(f"held_out/{name}", objective, x["loss"]) for objective, x in losses.items()]
        return {f"{prefix}/{task}/{name}": value for task, name, value in figures if math.isfinite(value)}

    def to_json(self, *, prompts: bool = True) -> dict[str, Any]:
        """The content of a result file; without `prompts` the answers to single prompts are left out."""
        values = asdict(self)
        for task in values["tasks"].values():
            task["rows"] = task.pop("prompts")  # the format's key
            if task["scoring"] == 1:  # as version 0.1.0 wrote it
                del task["scoring"]
        for section in _SECTIONS:
            if not values[section]:
                del values[section]
        if not prompts:
            for part in values.values():
                for task in part.values():
                    task.pop("rows", None)  # a text has none
        return values

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> EvaluationResult:
        tasks = {name: _task_from_json(task) for name, task in values["tasks"].items()}
        sections = {name: values.get(name, {}) for name in _SECTIONS}
        return EvaluationResult(tasks=tasks, **sections)


def _task_from_json(task: Mapping[str, Any]) -> TaskResult:
    values = {"prompts" if key == "rows" else key: value for key, value in task.items()}
    return TaskResult(**{**values, "intervals": {m: tuple(i) for m, i in task.get("intervals", {}).items()}})


def load_result(path: Path) -> EvaluationResult:
    """Read a result file of `bico-ds evaluate`, or a run's evaluation/step-N.json; `UserError` for anything else."""
    return result_in(read_result(path), path)


def read_result(path: Path) -> dict[str, Any]:
    """The content of such a file, with its parts of the types that they have; `UserError` for anything else."""
    try:
        values = read_object(path, strict=False)
        if "tasks" in values or "weights" not in values:
            check_tasks(values.get("tasks"))
            check_training_texts(values.get("training_texts", {}), values["tasks"])
        for section in ("texts", "retention", "retention_before"):
            check_perplexities(section, values.get(section, {}))
        check_losses(values.get("held_out", {}))
    except (ValueError, KeyError, TypeError) as error:
        reason = error.reason if isinstance(error, JsonError) else error
        raise UserError(f"{path}: not a result of bico-ds evaluate or of a run ({reason})") from error
    return values


def result_in(values: Mapping[str, Any], path: Path) -> EvaluationResult:
    """The result that `read_result` found in `path`; `UserError` where no reversal task was asked."""
    if "tasks" not in values:
        raise UserError(
            f"{path}: this evaluation asked no reversal task, and a comparison is of their scores: evaluate with --data, too"
        )
    try:
        return EvaluationResult.from_json(values)
    except TypeError as error:  # a key of a task that is none
        raise UserError(f"{path}: not a result of bico-ds evaluate or of a run ({error})") from error
