"""The evaluation of one model: generation on every task, scored, with intervals and floors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from bico_ds.data.tokenizer import Tokenizer
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.evaluation.scoring.generation import check_lengths, encode_prompts, generate_greedy
from bico_ds.evaluation.scoring.metrics import floors, score_rows
from bico_ds.evaluation.scoring.share import WHOLE_SHARE, PromptShare
from bico_ds.evaluation.scoring.statistics import clustered_interval
from bico_ds.evaluation.tasks.task import Task

_SLACK_TOKENS = 8


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
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    asking: Asking,
    share: PromptShare = WHOLE_SHARE,
) -> EvaluationResult | None:
    """Greedy answers of `model` (a Hugging Face causal LM on `share.device`) to all `tasks`, scored; the same
    result on every rank.

    Returns None when `share.should_stop` was true on any rank. Raises UserError, before any generation, for a
    prompt that is empty or does not fit the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    prepared = [prepare_task(tokenizer, task, asking, context=context) for task in tasks]
    results = {}
    for task, (prompts, new_tokens) in zip(tasks, prepared, strict=True):
        predictions = generate_greedy(model, tokenizer, prompts, max_new_tokens=new_tokens, share=share)
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
