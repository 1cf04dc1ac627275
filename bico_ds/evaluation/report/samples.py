"""Answers of a model as lines to read: what was asked, what is right, what it wrote. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bico_ds.common.printable import escaped
from bico_ds.evaluation.results import EvaluationResult

_RECALL = {
    "same": "  (in the training texts, in this order)",
    "both": "  (in the training texts, in both orders)",
    "reverse": "  (in the training texts, the other way round)",
    "neither": "",
}


def sample_lines(result: EvaluationResult, count: int) -> Iterator[str]:
    """Of each task up to `count` answers, evenly from its first question to its last: none is picked by its score."""
    for name, task in result.tasks.items():
        orders = result.training_texts.get(name, {}).get("rows", [])
        chosen = _evenly(len(task.prompts), count)
        if chosen:
            yield f"{name}: {len(chosen):,} of {len(task.prompts):,} answers"
        for index in chosen:
            row = task.prompts[index]
            yield f"  {_mark(row, task.headline)}{_RECALL[orders[index]] if orders else ''}"
            yield f"    prompt: {escaped(row['prompt'])}"
            yield f"    right:  {escaped(row['answer'].strip())}"
            yield f"    given:  {escaped(row['prediction'])}"


def _evenly(total: int, count: int) -> Sequence[int]:
    count = min(total, count)
    return [index * total // count for index in range(count)]


def _mark(row: Mapping[str, Any], metric: str) -> str:
    score = row[metric]
    if metric in ("bleu", "char_bleu"):
        return f"{metric} {score:.2f}"
    return f"{'right' if score else 'wrong'} ({metric})"
