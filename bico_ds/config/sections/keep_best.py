"""The recipe's keys of the checkpoint that is kept because the model was best there, and which metrics it can go by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from pydantic import Field

from bico_ds.common.errors import did_you_mean
from bico_ds.config.section import Section
from bico_ds.config.sections.evaluation import EvaluationSpec, Metric

LIKELIHOOD_METRICS = ("difference", "rank", "forced_choice", "nll")
# Of it the loss is measured in held-out texts, whether it is one of the run's objectives or not.
NTP = "ntp"

_MOST_SHOWN = 12


class KeepBestSpec(Section):
    """Which of the evaluated steps is kept, and exported at the end."""

    metric: str = Field(
        description="as in metrics.jsonl, without `evaluation/`: `TASK/headline`, `TASK/contains`, `text/NAME/perplexity`, "
        "`held_out/NAME/OBJECTIVE` …",
        examples=["company_backward/headline"],
    )
    mode: Literal["max", "min"] = Field(
        description="whether more of the metric is better, or less", examples=["max"]
    )


def metrics_of(
    evaluation: EvaluationSpec,
    objectives: Iterable[str],
    answers: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """The metrics that an evaluation can give, headlines first, as `KeepBestSpec.metric` names them.

    `objectives`: the names of the run's. `answers`: by task the metrics that it has; None: any that there is.
    """
    if answers is None:
        answers = dict.fromkeys(evaluation.task_names, get_args(Metric))
    likelihoods = LIKELIHOOD_METRICS if evaluation.likelihood_others is not None else ()
    names = [f"{task}/headline" for task in answers]
    names += [
        f"held_out/{store.name}/{objective}"
        for store in evaluation.held_out
        for objective in dict.fromkeys([*objectives, NTP])
    ]
    names += [
        f"text/{text.name}/{figure}" for text in evaluation.texts for figure in ("perplexity", "times_base")
    ]
    return names + [f"{task}/{metric}" for task, own in answers.items() for metric in (*own, *likelihoods)]


def unknown_metric(metric: str, known: Sequence[str]) -> str | None:
    """What is wrong with a metric that is none of `known`; None where it is one of them."""
    if metric in known:
        return None
    if not known:
        return "the recipe measures nothing during training: name tasks, texts or held-out stores in 'evaluation.tasks'"
    shown = ", ".join(known[:_MOST_SHOWN]) + (" …" if len(known) > _MOST_SHOWN else "")
    return f"no evaluation of this recipe gives '{metric}'{did_you_mean(metric, known)}; there are {shown}"
