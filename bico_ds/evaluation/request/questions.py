"""The questions of a request: answers that are scored, log-probabilities, and what the training texts hold of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

from bico_ds.evaluation.contamination import TrainingTexts, apart, find_orders
from bico_ds.evaluation.request.asked import Load, Request
from bico_ds.evaluation.result_file import Part, ResultFile, identity_of
from bico_ds.evaluation.results import EvaluationResult
from bico_ds.evaluation.run_tasks import evaluate, score_task
from bico_ds.evaluation.scoring.choice import choice_test
from bico_ds.evaluation.scoring.metrics import SCORING_VERSION
from bico_ds.evaluation.scoring.share import PromptShare
from bico_ds.evaluation.tasks.further_sets import READERS
from bico_ds.evaluation.tasks.of_recipe import tasks_of_recipe
from bico_ds.evaluation.tasks.task import Task, load_tasks


def tasks_of(request: Request) -> list[Task]:
    """The tasks that are asked. Raises `UserError` for a file that is missing or malformed."""
    if request.recipe is not None:
        return tasks_of_recipe(request.recipe)
    tasks = load_tasks(request.data, request.tasks, request.limit) if request.data else []
    for kind, path in request.further.items():
        tasks += READERS[kind](path, request.limit)
    return tasks


def task_parts(
    request: Request, share: PromptShare, task: Task, load: Load, file: ResultFile
) -> Iterator[Part]:
    """The scored answers of a task, and with `likelihood` its log-probability test.

    Answers that an earlier version scored by other rules are scored again, without the model.
    """
    # Where answers end at EOS alone, the identity is that of earlier versions, which knew nothing else.
    stops = [] if request.stops == [request.tokenizer.eos_token_id] else [request.stops]
    cut = ["as long as its answers"] if request.generation.cut_to_answers else []
    identity = _task_identity(task, request.max_new_tokens, request.add_bos, *stops, *cut)

    def generate() -> dict[str, Any] | None:
        file.discard("training_texts", task.name)  # its scores are of the answers that are replaced now
        if (known := file.content("tasks", task.name, identity)) is not None:
            predictions = [row["prediction"] for row in known["rows"]]
            rescored = score_task(task, predictions, new_tokens=known["new_tokens"])
            return EvaluationResult(tasks={task.name: rescored}).to_json()["tasks"][task.name]
        model, tokenizer = load(request.model, "--model")
        result = evaluate(model, tokenizer, [task], request.generation, share)
        return None if result is None else result.to_json()["tasks"][task.name]

    def choose() -> dict[str, Any] | None:
        model, tokenizer = load(request.model, "--model")
        return choice_test(
            model, tokenizer, task, others=request.others, add_bos=request.add_bos, share=share
        )

    yield Part(
        section="tasks",
        name=task.name,
        identity=identity,
        size=len(task),
        compute=generate,
        is_current=lambda content: content.get("scoring") == SCORING_VERSION,
    )
    if request.likelihood:
        yield Part(
            section="choice",
            name=task.name,
            identity=_choice_identity(task, request),
            size=len(task) * (request.others + 1),
            compute=choose,
        )


def contamination_parts(
    request: Request, share: PromptShare, tasks: Sequence[Task], texts: TrainingTexts, file: ResultFile
) -> Iterator[Part]:
    """What the training texts hold of each task's questions; they are read once, for all tasks."""
    if not request.train:
        return
    orders = lru_cache(maxsize=1)(lambda: find_orders(tasks, texts, share))

    def compute(task: Task) -> dict[str, Any] | None:
        found = orders()
        if found is None:
            return None
        result = EvaluationResult.from_json({"tasks": {task.name: file.values["tasks"][task.name]}})
        return apart(task, result.tasks[task.name], found[task.name], texts, rewritten=texts.rewritten(task))

    for task in tasks:
        identity = identity_of(_values(task), request.max_new_tokens, request.add_bos, texts.fingerprints)
        # Every rank reads its part of the documents, as it does of prompts.
        size = texts.documents if task is tasks[0] else 0
        yield Part(
            section="training_texts",
            name=task.name,
            identity=identity,
            size=size,
            compute=partial(compute, task),
        )


def _task_identity(task: Task, *options: Any) -> str:
    # The digest's key is `examples`, so that a part which version 0.1.0 computed is recognised.
    values = {"examples" if key == "questions" else key: value for key, value in _values(task).items()}
    for question in values["examples"]:
        del question["subjects"], question["paraphrases"]  # no answer or score depends on them
    return identity_of(values, *options)


def _values(task: Task) -> dict[str, Any]:
    """What is in a task's identities; of one whose metric nobody chose, that of earlier versions."""
    values = asdict(task)
    if task.metric is None:
        del values["metric"]
    return values


def _choice_identity(task: Task, request: Request) -> str:
    # Which answers count as wrong depends on the rules of comparison, but for ASCII texts.
    answers = "".join(answer for question in task.questions for answer in question.right_answers)
    rules = () if answers.isascii() else (SCORING_VERSION,)
    return _task_identity(task, request.others, request.add_bos, *rules)
