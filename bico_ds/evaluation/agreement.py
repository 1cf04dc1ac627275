"""How far a fine-tuned model still answers as its base does: the base's own greedy answers to instructions.

A perplexity is of texts that somebody wrote; this asks about what the base itself would say. No answer is right or wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bico_ds.common.errors import UserError
from bico_ds.data.tokenizer import Tokenizer
from bico_ds.evaluation.instructions import Instruction
from bico_ds.evaluation.scoring.generation import greedy_tokens
from bico_ds.evaluation.scoring.likelihood import Scored, greedy_matches, log_probabilities
from bico_ds.evaluation.scoring.share import ONE_PROCESS, PromptShare
from bico_ds.evaluation.scoring.statistics import clustered_interval, share_interval

BEGINNINGS = (16, 32)  # tokens by which two answers are compared


def answers_of_base(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    instructions: Sequence[Instruction],
    *,
    max_new_tokens: int,
    share: PromptShare = ONE_PROCESS,
) -> dict[str, Any] | None:
    """The base's greedy answers as token ids without the final stop token, with what the base itself makes of them.

    `rows`: by instruction, `ids` of the answer, its `log_prob` (nats, of all its tokens), and `matches`: on how many of its
    tokens the base's likeliest next token is the answer's. That is all of them but for rounding: answers are generated
    with a cache and scored without. Returns None when `share.should_stop` was true on any rank. Raises `UserError` where no
    answer has a token. Collective.
    """
    prompts = [instruction.ids for instruction in instructions]
    answers = greedy_tokens(model, tokenizer, prompts, max_new_tokens=max_new_tokens, share=share)
    if answers is None:
        return None
    if not any(answers):
        raise UserError("--base: the model ends each answer to the instructions before its first token")
    forced = _forced(model, instructions, answers, share)
    if forced is None:
        return None
    return {
        "max_new_tokens": max_new_tokens,
        "rows": [
            {"instruction": instruction.text, "line": instruction.line, "answer": text, "ids": ids, **values}
            for instruction, text, ids, values in zip(
                instructions,
                tokenizer.batch_decode(answers, skip_special_tokens=True),
                answers,
                forced,
                strict=True,
            )
        ],
    }


def agreement(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    instructions: Sequence[Instruction],
    base: Mapping[str, Any],
    share: PromptShare = ONE_PROCESS,
) -> dict[str, Any] | None:
    """How far the model agrees with `base`, the content that `answers_of_base` gave. Collective.

    `agreement`: share of the tokens of the base's answers that are the model's likeliest next ones after the base's tokens
    before them (`base_agreement`: the base's own share, 1 but for rounding). `identical_16`, `identical_32`: share of the
    instructions whose own greedy answer begins with the same so many tokens, or is the same where it is shorter.
    `log_prob`, `base_log_prob`: of the base's answers, nats per token; `log_prob_change` is the difference. All tokens count
    alike. `intervals` are 95 %, instructions resampled. Returns None where it was stopped.
    """
    answers = [row["ids"] for row in base["rows"]]
    prompts = [instruction.ids for instruction in instructions]
    own = greedy_tokens(model, tokenizer, prompts, max_new_tokens=base["max_new_tokens"], share=share)
    if own is None:
        return None
    forced = _forced(model, instructions, answers, share)
    if forced is None:
        return None
    texts = tokenizer.batch_decode(own, skip_special_tokens=True)
    rows = [
        {
            "instruction": row["instruction"],
            "line": row["line"],
            "base_answer": row["answer"],
            "answer": text,
            "tokens": len(row["ids"]),
            **values,
            "base_log_prob": row["log_prob"],
            "base_matches": row["matches"],
            **{f"identical_{n}": float(ids[:n] == row["ids"][:n]) for n in BEGINNINGS},
        }
        for row, ids, text, values in zip(base["rows"], own, texts, forced, strict=True)
    ]
    return {"max_new_tokens": base["max_new_tokens"], **_statistics(rows), "rows": rows}


def _forced(
    model: PreTrainedModel,
    instructions: Sequence[Instruction],
    answers: Sequence[Sequence[int]],
    share: PromptShare,
) -> list[dict[str, float]] | None:
    """`log_prob` and `matches` of each answer after its instruction."""
    texts = [
        Scored(ids=(*instruction.ids, *answer), answer_tokens=len(answer))
        for instruction, answer in zip(instructions, answers, strict=True)
    ]
    sums = log_probabilities(model, texts, share)
    matches = None if sums is None else greedy_matches(model, texts, share)
    if sums is None or matches is None:
        return None
    return [{"log_prob": x, "matches": n} for x, n in zip(sums, matches, strict=True)]


def _statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens = np.array([row["tokens"] for row in rows])
    of_tokens = {
        "agreement": np.array([row["matches"] for row in rows]),
        "base_agreement": np.array([row["base_matches"] for row in rows]),
        "log_prob": np.array([row["log_prob"] for row in rows]),
        "base_log_prob": np.array([row["base_log_prob"] for row in rows]),
    }
    of_tokens["log_prob_change"] = of_tokens["log_prob"] - of_tokens["base_log_prob"]
    # Each token stands for its answer's mean, so that resampled instructions weigh as many tokens as they have.
    scores = {
        name: np.repeat(sums[tokens > 0] / tokens[tokens > 0], tokens[tokens > 0])
        for name, sums in of_tokens.items()
    }
    numbers = [str(number) for number in range(len(rows))]
    groups = {name: np.repeat(numbers, tokens).tolist() for name in scores}
    for n in BEGINNINGS:
        scores[f"identical_{n}"] = np.array([row[f"identical_{n}"] for row in rows])
        groups[f"identical_{n}"] = numbers
    return {
        "instructions": len(rows),
        "tokens": int(tokens.sum()),
        **{name: float(values.mean()) for name, values in scores.items()},
        "intervals": {
            name: (clustered_interval if "log_prob" in name else share_interval)(
                values.tolist(), groups[name]
            )
            for name, values in scores.items()
        },
    }
