"""Two models on the same prompts: the difference of their scores, prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bico_ds.evaluation.results import TaskResult
from bico_ds.evaluation.scoring.statistics import gain_interval


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean over `prompts` prompts about `persons` persons, with its 95 % interval (persons resampled)."""

    mean: float
    interval: tuple[float, float]
    prompts: int
    persons: int


def paired_differences(first: TaskResult, second: TaskResult) -> dict[str, Difference]:
    """`second` minus `first` in every metric that both have; empty unless both answered the same prompts.

    What makes a prompt hard, or a person well known, is in both scores and cancels in the difference: its interval is
    narrower than those of the two scores suggest.
    """
    if not same_prompts(first, second):
        return {}
    groups = [prompt["group"] for prompt in first.prompts]
    differences = {}
    for metric in [name for name in first.metrics if name in second.metrics]:
        scores = [np.array([prompt[metric] for prompt in result.prompts]) for result in (first, second)]
        gains = scores[1] - scores[0]
        differences[metric] = Difference(
            mean=float(gains.mean()),
            interval=gain_interval(gains.tolist(), groups),
            prompts=len(groups),
            persons=len(set(groups)),
        )
    return differences


def same_prompts(first: TaskResult, second: TaskResult) -> bool:
    """Whether both results hold their prompts, and these are the same, with the same answers, in the same order."""
    asked = [[(x["prompt"], x["answer"]) for x in result.prompts] for result in (first, second)]
    return bool(asked[0]) and asked[0] == asked[1]
