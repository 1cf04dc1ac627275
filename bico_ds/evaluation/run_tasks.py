"""Evaluate one model: generate an answer to every prompt of every task, and score it, with intervals and floors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from bico_ds.config.sections.evaluation import EvaluationSpec
from bico_ds.data.tokenizer import Tokenizer
from bico_ds.evaluation.results import EvaluationResult, TaskResult
from bico_ds.evaluation.scoring.generation import check_lengths, encode_prompts, generate_greedy
from bico_ds.evaluation.scoring.metrics import SCORING_VERSION, floors, score_predictions
from bico_ds.evaluation.scoring.share import ONE_PROCESS, PromptShare
from bico_ds.evaluation.scoring.statistics import share_interval
from bico_ds.evaluation.tasks.task import Task

_SLACK_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How answers are generated.

    `cut_to_answers`: no more than about twice the tokens of a task's longest answer; without it always up to
    `max_new_tokens`, as the papers do. `add_bos`: prompts begin with BOS, as the training texts did.
    """

    max_new_tokens: int = 40
    cut_to_answers: bool = True
    add_bos: bool = True


def options_in_training(spec: EvaluationSpec, *, add_bos: bool) -> GenerationOptions:
    """How a run generates answers, by its recipe."""
    return GenerationOptions(max_new_tokens=spec.max_new_tokens, add_bos=add_bos)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    options: GenerationOptions,
    share: PromptShare = ONE_PROCESS,
) -> EvaluationResult | None:
    """Greedy answers of `model` (a Hugging Face causal LM on `share.device`) to all `tasks`, scored. Collective.

    Returns the same result on every rank, or None when `share.should_stop` was true on any of them. Raises `UserError`,
    before any generation, for a prompt that is empty or does not fit the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    prepared = [prepare_task(tokenizer, task, options, context=context) for task in tasks]
    results = {}
    for task, (prompts, new_tokens) in zip(tasks, prepared, strict=True):
        predictions = generate_greedy(model, tokenizer, prompts, max_new_tokens=new_tokens, share=share)
        if predictions is None:
            return None
        results[task.name] = score_task(task, predictions, new_tokens=new_tokens)
    return EvaluationResult(tasks=results)


def prepare_task(
    tokenizer: Tokenizer, task: Task, options: GenerationOptions, *, context: int | None
) -> tuple[list[list[int]], int]:
    """Encoded prompts of one task, and how many new tokens each answer may have.

    Raises `UserError` where a prompt with its answer does not fit the context.
    """
    texts = [question.prompt for question in task.questions]
    prompts = encode_prompts(tokenizer, texts, add_bos=options.add_bos)
    new_tokens = options.max_new_tokens
    if options.cut_to_answers:
        completions = [question.completion for question in task.questions]
        answers = tokenizer(completions, add_special_tokens=False)["input_ids"]
        new_tokens = min(new_tokens, 2 * max(map(len, answers)) + _SLACK_TOKENS)
    names = [f"{task.path}:{question.line}" for question in task.questions]
    check_lengths(prompts, new_tokens=new_tokens, context=context, names=names)
    return prompts, new_tokens


def unreachable_answers(tokenizer: Tokenizer, task: Task, options: GenerationOptions) -> int:
    """How many questions have right answers of more tokens than `options.max_new_tokens` alone: none can be given."""
    answers = [question.right_answers for question in task.questions]
    encoded = iter(
        tokenizer([text for texts in answers for text in texts], add_special_tokens=False)["input_ids"]
    )
    return sum(min(len(next(encoded)) for _ in texts) > options.max_new_tokens for texts in answers)


def score_task(task: Task, predictions: Sequence[str], *, new_tokens: int) -> TaskResult:
    """Metrics, intervals and floors of one task. `predictions`: in the order of its questions; `task.cut` of each counts."""
    predictions = [task.cut(prediction) for prediction in predictions]
    scores = score_predictions(task, predictions)
    groups = [question.group for question in task.questions]
    prompts = [
        {
            "prompt": question.prompt,
            "answer": question.completion,
            "prediction": prediction,
            "group": question.group,
            "line": question.line,
            **{name: values[index] for name, values in scores.items()},
        }
        for index, (question, prediction) in enumerate(zip(task.questions, predictions, strict=True))
    ]
    return TaskResult(
        headline=task.headline,
        metrics={name: sum(values) / len(values) for name, values in scores.items()},
        intervals={name: share_interval(values, groups) for name, values in scores.items()},
        floors=dict(floors(task)),
        new_tokens=new_tokens,
        scoring=SCORING_VERSION,
        prompts=prompts,
    )
