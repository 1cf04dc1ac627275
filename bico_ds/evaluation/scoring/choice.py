"""The log-probability test: does the model hold the right answer for likelier than other persons' answers?

Generation may fail where knowledge is there in part; this test sees it. Berglund et al. (arXiv 2309.12288,
section 2.1.2) compare the log-probability of the right name with that of another person's by a t-test and a
Kolmogorov-Smirnov test, over prompts. Prompts of one person are not independent, so that their p-values are
too small; the paired t-test over persons beside them is the one to trust.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from transformers import PreTrainedModel

from bico_ds.common.errors import UserError
from bico_ds.data.tokenizer import Tokenizer
from bico_ds.evaluation.scoring.generation import check_lengths
from bico_ds.evaluation.scoring.likelihood import Scored, encode_answers, log_probabilities
from bico_ds.evaluation.scoring.metrics import wrong_answers
from bico_ds.evaluation.scoring.share import WHOLE_SHARE, PromptShare
from bico_ds.evaluation.scoring.statistics import clustered_interval, group_means
from bico_ds.evaluation.tasks.task import Task


def encode_candidates(
    tokenizer: Tokenizer, task: Task, *, others: int, add_bos: bool, context: int | None
) -> list[list[Scored]]:
    """For every row its prompt with the right answer, then with those of up to `others` other persons, as many in every
    row.

    Raises UserError where a row has no wrong answer of another person, or a text is empty or does not fit the context.
    """
    wrong = wrong_answers(task, others)
    if not wrong[0]:
        raise UserError(
            f"{task.path}: the log-probability test needs, for every row, another person (group) with another "
            "answer"
        )
    rows = []
    for example, theirs in zip(task.examples, wrong, strict=True):
        answers = [example.completion, *theirs]
        texts = encode_answers(tokenizer, [example.prompt] * len(answers), answers, add_bos=add_bos)
        names = [f"{task.path}:{example.line}"] * len(answers)
        check_lengths([text.ids for text in texts], new_tokens=0, context=context, names=names)
        rows.append(texts)
    return rows


def choice_test(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    task: Task,
    *,
    others: int = 9,
    add_bos: bool = True,
    share: PromptShare = WHOLE_SHARE,
) -> dict[str, Any] | None:
    """Score the right answer and those of up to `others` other persons for every prompt; see `choice_statistics`.

    None when `share.should_stop` was true on any rank. Raises UserError as `encode_candidates` does.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    rows = encode_candidates(tokenizer, task, others=others, add_bos=add_bos, context=context)
    scores = log_probabilities(model, [text for texts in rows for text in texts], share)
    if scores is None:
        return None
    log_probs = np.array(scores).reshape(len(rows), -1)
    right_tokens = np.array([texts[0].answer_tokens for texts in rows])
    return choice_statistics(log_probs, right_tokens, [example.group for example in task.examples])


def choice_statistics(
    log_probs: NDArray[np.float64], right_tokens: NDArray[np.integer], groups: Sequence[str]
) -> dict[str, Any]:
    """Statistics of `log_probs` [prompts, candidates], the right answer in column 0, others' in the rest.

    `difference`: right minus the mean of the others, nats; `rank`: place of the right answer among the
    candidates, 1 is best; `forced_choice`: share of prompts where it is the likeliest (`forced_choice_chance`
    by guessing); a tie counts against it in both. `nll`: nats per right answer, `nll_per_token`: per token of it.
    Intervals are 95 %, persons resampled. `t_test` (Welch) and `ks_test`: right against the first other's, over prompts,
    as Berglund et al.; `person_t_test`: difference against zero, over persons, None where there is one only. A test
    figure that is not defined (all differences alike) is None: JSON has no NaN.
    """
    right, wrong = log_probs[:, 0], log_probs[:, 1:]
    rows = {
        "difference": right - wrong.mean(axis=1),
        "rank": 1.0 + (wrong >= right[:, None]).sum(axis=1),
        "forced_choice": (wrong < right[:, None]).all(axis=1).astype(float),
        "nll": -right,
    }
    by_person = group_means(rows["difference"], groups)
    return {
        "candidates": log_probs.shape[1],
        "forced_choice_chance": 1.0 / log_probs.shape[1],
        **{name: float(values.mean()) for name, values in rows.items()},
        "nll_per_token": float(-right.sum() / right_tokens.sum()),
        "intervals": {name: clustered_interval(values, groups) for name, values in rows.items()},
        "t_test": _test(stats.ttest_ind(right, wrong[:, 0], equal_var=False)),
        "ks_test": _test(stats.ks_2samp(right, wrong[:, 0])),
        "person_t_test": _test(stats.ttest_1samp(by_person, 0.0)) if len(by_person) > 1 else None,
        "rows": {"right": right.tolist(), "others": wrong.tolist()},
    }


def _test(result: Any) -> dict[str, float | None]:
    figures = {"statistic": float(result.statistic), "p_value": float(result.pvalue)}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
