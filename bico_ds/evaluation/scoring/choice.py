"""The log-probability test: does the model give the right answer a higher probability than other persons' answers?

Generation may fail where knowledge is there in part; this test shows it. Berglund et al. (arXiv 2309.12288, section 2.1.2)
compare the log-probability of the right name with that of another person's by a t-test and a Kolmogorov-Smirnov test over
prompts. Prompts about one person are not independent, so these p-values are too small; the one to trust is that of the
t-test over persons, which stands beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from bico_ds.common.errors import UserError
from bico_ds.data.tokenizer import Tokenizer
from bico_ds.evaluation.scoring.generation import check_lengths
from bico_ds.evaluation.scoring.likelihood import Scored, encode_answers, log_probabilities
from bico_ds.evaluation.scoring.metrics import wrong_answers
from bico_ds.evaluation.scoring.share import ONE_PROCESS, PromptShare
from bico_ds.evaluation.scoring.statistics import clustered_interval, group_means, share_interval
from bico_ds.evaluation.tasks.task import Task


def encode_candidates(
    tokenizer: Tokenizer, task: Task, *, others: int, add_bos: bool, context: int | None
) -> list[list[Scored]]:
    """For every prompt, that prompt with the right answer, then with wrong answers of up to `others` other persons.

    Every prompt gets the same number of wrong answers. Raises `UserError` where a prompt has none, and where a text is empty
    or does not fit the context.
    """
    wrong = wrong_answers(task, others)
    if not wrong[0]:
        raise UserError(
            f"{task.path}: the log-probability test needs, for every prompt, another person (group) with another "
            "answer"
        )
    candidates = []
    for question, theirs in zip(task.questions, wrong, strict=True):
        answers = [question.completion, *theirs]
        texts = encode_answers(tokenizer, [question.prompt] * len(answers), answers, add_bos=add_bos)
        names = [f"{task.path}:{question.line}"] * len(answers)
        check_lengths([text.ids for text in texts], new_tokens=0, context=context, names=names)
        candidates.append(texts)
    return candidates


def choice_test(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    task: Task,
    *,
    others: int = 9,
    add_bos: bool = True,
    share: PromptShare = ONE_PROCESS,
) -> dict[str, Any] | None:
    """Score the right answer and those of up to `others` other persons for every prompt; see `choice_statistics`.

    Returns None when `share.should_stop` was true on any rank. Raises `UserError` as `encode_candidates` does. Collective.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    candidates = encode_candidates(tokenizer, task, others=others, add_bos=add_bos, context=context)
    scores = log_probabilities(model, [text for texts in candidates for text in texts], share)
    if scores is None:
        return None
    log_probs = np.array(scores).reshape(len(candidates), -1)
    right_tokens = np.array([texts[0].answer_tokens for texts in candidates])
    return choice_statistics(log_probs, right_tokens, [question.group for question in task.questions])


def choice_statistics(
    log_probs: NDArray[np.float64], right_tokens: NDArray[np.integer], groups: Sequence[str]
) -> dict[str, Any]:
    """Statistics of `log_probs` [prompts, candidates], nats: the right answer in column 0, wrong ones in the others.

    `difference`: right minus the mean of the wrong ones, nats. `rank`: place of the right answer among the candidates, 1 is
    best. `forced_choice`: fraction of prompts where the right answer has the highest probability (`forced_choice_chance` by
    guessing). A tie counts against the right answer in both. `nll`: nats per right answer; `nll_per_token`: nats per token
    of a right answer. Intervals are 95 %, persons resampled.

    `t_test` (Welch) and `ks_test`: right against the first wrong answer, over prompts, as in Berglund et al.;
    `person_t_test`: difference against zero, over persons, None with one person only. A test figure that is not defined
    (all differences alike) is None: JSON has no NaN. `rows`, a key of the format: the log-probabilities of every prompt.
    """
    from scipy import stats  # a second, which a start of training need not wait

    right, wrong = log_probs[:, 0], log_probs[:, 1:]
    scores = {
        "difference": right - wrong.mean(axis=1),
        "rank": 1.0 + (wrong >= right[:, None]).sum(axis=1),
        "forced_choice": (wrong < right[:, None]).all(axis=1).astype(float),
        "nll": -right,
    }
    by_person = group_means(scores["difference"], groups)
    return {
        "candidates": log_probs.shape[1],
        "forced_choice_chance": 1.0 / log_probs.shape[1],
        **{name: float(values.mean()) for name, values in scores.items()},
        "nll_per_token": float(-right.sum() / right_tokens.sum()),
        "intervals": {
            name: (share_interval if name == "forced_choice" else clustered_interval)(values.tolist(), groups)
            for name, values in scores.items()
        },
        "t_test": _test(stats.ttest_ind(right, wrong[:, 0], equal_var=False)),
        "ks_test": _test(stats.ks_2samp(right, wrong[:, 0])),
        "person_t_test": _test(stats.ttest_1samp(by_person, 0.0)) if len(by_person) > 1 else None,
        "rows": {"right": right.tolist(), "others": wrong.tolist()},
    }


def _test(result: Any) -> dict[str, float | None]:
    figures = {"statistic": float(result.statistic), "p_value": float(result.pvalue)}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
