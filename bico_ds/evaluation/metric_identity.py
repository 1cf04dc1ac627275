"""What a metric is measured on, as a digest: two values of it compare where that is equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from bico_ds.config.sections.keep_best import LIKELIHOOD_METRICS
from bico_ds.evaluation.held_out.stores import HeldOutStore
from bico_ds.evaluation.retention_texts import RetentionText
from bico_ds.evaluation.run_tasks import GenerationOptions
from bico_ds.evaluation.tasks.task import Task


def metric_identity(
    metric: str,
    *,
    tasks: Sequence[Task],
    texts: Sequence[RetentionText],
    held_out: Sequence[HeldOutStore],
    options: GenerationOptions,
    others: int | None,
) -> str:
    """The digest of what `metric` (as `KeepBestSpec.metric` names it) is measured on, wherever the files of it lie.

    `others`: `evaluation.likelihood_others`. Raises `KeyError` for a metric of none of these.
    """
    kind, _, rest = metric.partition("/")
    name, _, last = rest.partition("/")
    if kind == "text":
        return {text.spec.name: text for text in texts}[name].identity
    if kind == "held_out":
        return {store.spec.name: store for store in held_out}[name].batches[last].identity
    content = _of_task({task.name: task for task in tasks}[kind], rest, options, others)
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def _of_task(task: Task, figure: str, options: GenerationOptions, others: int | None) -> list[Any]:
    questions = [[question.prompt, *question.right_answers] for question in task.questions]
    if figure in LIKELIHOOD_METRICS:
        return [questions, [question.group for question in task.questions], others, options.add_bos]
    scored_by = task.headline if figure == "headline" else figure
    return [questions, task.ends, scored_by, options.max_new_tokens, options.cut_to_answers, options.add_bos]
