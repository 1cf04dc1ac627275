"""The evaluation of one model: generation on every task, scored, with intervals and floors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bico_ds.config.errors import UserError
from bico_ds.data.tokenizer import Tokenizer
from bico_ds.evaluation.generation import check_lengths, encode_prompts, generate_greedy
from bico_ds.evaluation.metrics import floors, score_rows
from bico_ds.evaluation.place import ALONE, Place
from bico_ds.evaluation.statistics import clustered_interval
from bico_ds.evaluation.tasks import Task

_SLACK_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task's scores, all in 0 … 1. `headline`: the metric that tables and plots show. `intervals`: 95 %,
    persons resampled. `floors`: what another person's answer scores. `new_tokens`: how many an answer could have (0: not
    known). `rows`: every prompt with its prediction and scores.
    """

    headline: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    new_tokens: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def score(self) -> float:
        return self.metrics[self.headline]


CHOICE_SCALARS = ("difference", "rank", "forced_choice", "nll")


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Results by task name, in the order asked for. `choice`: log-probability tests (`choice_statistics`) by task
    name, where they were asked for."""

    tasks: dict[str, TaskResult]
    choice: dict[str, dict[str, Any]] = field(default_factory=dict)

    def scalars(self, prefix: str = "evaluation") -> dict[str, float]:
        """`{prefix}/{task}/{metric}` for logs."""
        figures = [(task, name, value) for task, x in self.tasks.items() for name, value in x.metrics.items()]
        figures += [(task, name, x[name]) for task, x in self.choice.items() for name in CHOICE_SCALARS]
        return {f"{prefix}/{task}/{name}": value for task, name, value in figures}

    def to_json(self, *, rows: bool = True) -> dict[str, Any]:
        values = asdict(self)
        if not self.choice:
            del values["choice"]
        if not rows:
            for part in values.values():
                for task in part.values():
                    del task["rows"]
        return values

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> EvaluationResult:
        tasks = {
            name: TaskResult(**{**task, "intervals": {m: tuple(i) for m, i in task["intervals"].items()}})
            for name, task in values["tasks"].items()
        }
        return EvaluationResult(tasks=tasks, choice=values.get("choice", {}))


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How answers are asked for. `cut_to_answers`: generate no more than about twice the longest answer of a
    task; without it always up to `max_new_tokens`, as the papers do. `add_bos`: prompts begin with BOS, as the
    training texts did.
    """

    max_new_tokens: int = 40
    cut_to_answers: bool = True
    add_bos: bool = True


def evaluate(
    model: PreTrainedModel, tokenizer: Tokenizer, tasks: Sequence[Task], asking: Asking, place: Place = ALONE
) -> EvaluationResult | None:
    """Greedy answers of `model` (a Hugging Face causal LM on `place.device`) to all `tasks`, scored; the same
    result on every rank.

    Returns None when `place.should_stop` was true on any rank. Raises UserError, before any generation, for a
    prompt that is empty or does not fit the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    prepared = [prepare_task(tokenizer, task, asking, context=context) for task in tasks]
    results = {}
    for task, (prompts, new_tokens) in zip(tasks, prepared, strict=True):
        predictions = generate_greedy(model, tokenizer, prompts, max_new_tokens=new_tokens, place=place)
        if predictions is None:
            return None
        results[task.name] = score_task(task, predictions, new_tokens=new_tokens)
    return EvaluationResult(tasks=results)


def prepare_task(
    tokenizer: Tokenizer, task: Task, asking: Asking, *, context: int | None
) -> tuple[list[list[int]], int]:
    """Encoded prompts and the number of new tokens of one task. UserError where one does not fit the context."""
    prompts = encode_prompts(tokenizer, [example.prompt for example in task.examples], add_bos=asking.add_bos)
    new_tokens = asking.max_new_tokens
    if asking.cut_to_answers:
        answers = tokenizer([example.completion for example in task.examples], add_special_tokens=False)[
            "input_ids"
        ]
        new_tokens = min(new_tokens, 2 * max(map(len, answers)) + _SLACK_TOKENS)
    check_lengths(
        prompts,
        new_tokens=new_tokens,
        context=context,
        names=[f"{task.path}:{example.line}" for example in task.examples],
    )
    return prompts, new_tokens


def score_task(task: Task, predictions: Sequence[str], *, new_tokens: int) -> TaskResult:
    """Metrics, intervals and floors of one task from its predictions, in the task's order. What is scored and
    kept of a prediction is its `task.cut`.
    """
    predictions = [task.cut(prediction) for prediction in predictions]
    scores = score_rows(task, predictions)
    groups = [example.group for example in task.examples]
    rows = [
        {
            "prompt": example.prompt,
            "answer": example.completion,
            "prediction": prediction,
            "group": example.group,
            "line": example.line,
            **{name: values[index] for name, values in scores.items()},
        }
        for index, (example, prediction) in enumerate(zip(task.examples, predictions, strict=True))
    ]
    return TaskResult(
        headline=task.headline,
        metrics={name: sum(values) / len(values) for name, values in scores.items()},
        intervals={name: clustered_interval(values, groups) for name, values in scores.items()},
        floors=dict(floors(task)),
        new_tokens=new_tokens,
        rows=rows,
    )


def load_result(path: Path) -> EvaluationResult:
    """Read a result file of tools/evaluate.py, or a run's evaluation/step-N.json; UserError for anything else."""
    try:
        return EvaluationResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a result of tools/evaluate.py or of a run ({error})") from error
