"""How near a prediction (a generated text) is to the right answer: every metric gives 0 … 1 for one prompt.

===========  =======================================================================================
contains     the answer stands somewhere in the prediction: the BICO paper's "exact match" (arXiv 2311.07468)
prefix       the prediction starts with the answer: Berglund et al.'s exact match (arXiv 2309.12288)
exact        the prediction is the answer and nothing else
bleu         sentence BLEU on words (sacrebleu, 13a, exponential smoothing)
char_bleu    sentence BLEU on characters without smoothing: what the BICO authors' code computes as "BLEU"
===========  =======================================================================================

All compare texts in their plain form (`bico_ds.evaluation.tasks.normalization`), where only another way to write the same
text does not count. The first three also ignore case, runs of white space and the final full stop. A *floor* is the score of
answering every question with another person's answer: any text in the right style reaches it, so only a score above it shows
knowledge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

from sacrebleu.metrics.bleu import BLEU

from bico_ds.evaluation.tasks.normalization import begins, normalized, plain_form, stands_in
from bico_ds.evaluation.tasks.task import Question, Task

# Of the rules by which texts are compared. Version 1 compared them as they were stored; in ASCII both give the same.
SCORING_VERSION = 2

_FLOOR_OTHERS = 5  # other persons that a prompt's floor is averaged over
_MAX_ORDER = 4


def contains(prediction: str, answer: str) -> float:
    return float(stands_in(normalized(answer), normalized(prediction)))


def prefix(prediction: str, answer: str) -> float:
    return float(begins(normalized(answer), normalized(prediction)))


def exact(prediction: str, answer: str) -> float:
    return float(normalized(prediction) == normalized(answer))


def bleu(prediction: str, answer: str) -> float:
    hypothesis, reference = plain_form(prediction).strip(), plain_form(answer).strip()
    return _sacrebleu().sentence_score(hypothesis, [reference]).score / 100.0


def char_bleu(prediction: str, answer: str) -> float:
    """BLEU-4 over characters, spaces included, no smoothing: NLTK's `sentence_bleu` handed plain strings."""
    hypothesis, reference = plain_form(prediction).strip(), plain_form(answer).strip()
    if not hypothesis:
        return 0.0
    logs = 0.0
    for order in range(1, _MAX_ORDER + 1):
        found, known = _ngrams(hypothesis, order), _ngrams(reference, order)
        matches = sum((found & known).values())
        if matches == 0:
            return 0.0
        logs += math.log(matches / sum(found.values())) / _MAX_ORDER
    brevity = min(0.0, 1.0 - len(reference) / len(hypothesis))
    return math.exp(logs + brevity)


METRICS: dict[str, Callable[[str, str], float]] = {
    "contains": contains,
    "prefix": prefix,
    "exact": exact,
    "bleu": bleu,
    "char_bleu": char_bleu,
}


def metrics_of(task: Task) -> tuple[str, ...]:
    """The metrics that mean something for this task: BLEU for long answers, or where the user asked for it."""
    long = {task.headline, task.suited_metric} & {"bleu", "char_bleu"}
    return tuple(METRICS) if long else ("contains", "prefix", "exact")


def score_predictions(task: Task, predictions: Sequence[str]) -> dict[str, list[float]]:
    """Every metric of the task for every prompt, in order; of several right answers the best match counts."""
    pairs = list(zip(predictions, (question.right_answers for question in task.questions), strict=True))
    return {
        name: [max(METRICS[name](prediction, answer) for answer in answers) for prediction, answers in pairs]
        for name in metrics_of(task)
    }


def other_answers(task: Task, others: int) -> list[list[str]]:
    """For every prompt, the completions of up to `others` other groups: the same number for all, none with one group only.

    Two groups may have the same answer, so that a completion of another group may be right by chance.
    """
    return _first_of_each(_others_in_turn(task), others)


def wrong_answers(task: Task, others: int) -> list[list[str]]:
    """The same without the completions that are right for the prompt; the next group's is taken in their place."""
    pairs = zip(_others_in_turn(task), task.questions, strict=True)
    return _first_of_each((_without_right(theirs, question) for theirs, question in pairs), others)


def _others_in_turn(task: Task) -> Iterator[Iterator[str]]:
    """For every prompt, one completion of each other group, at the same index among that group's prompts."""
    by_group: dict[str, list[str]] = {}
    indices = []
    for question in task.questions:
        indices.append(len(by_group.setdefault(question.group, [])))
        by_group[question.group].append(question.completion)
    answers = list(by_group.values())
    number = {group: number for number, group in enumerate(by_group)}
    for question, index in zip(task.questions, indices, strict=True):
        start = number[question.group] + 1
        yield (theirs[index % len(theirs)] for theirs in answers[start:] + answers[: start - 1])


def _without_right(answers: Iterable[str], question: Question) -> Iterator[str]:
    right = {normalized(answer) for answer in question.right_answers}
    return (answer for answer in answers if normalized(answer) not in right)


def _first_of_each(answers_by_prompt: Iterable[Iterator[str]], count: int) -> list[list[str]]:
    """The first `count` answers of every prompt, or as many as every prompt has."""
    taken = [list(islice(answers, count)) for answers in answers_by_prompt]
    width = min(map(len, taken))
    return [answers[:width] for answers in taken]


@lru_cache(maxsize=64)
def floors(task: Task) -> dict[str, float]:
    """Mean score of up to five other persons' answers per prompt, by metric; empty where there is one person only."""
    theirs = other_answers(task, _FLOOR_OTHERS)
    rounds = [score_predictions(task, answers) for answers in zip(*theirs, strict=True)]
    scores = {name: [score for scored in rounds for score in scored[name]] for name in metrics_of(task)}
    return {name: sum(values) / len(values) for name, values in scores.items() if values}


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


@lru_cache(maxsize=1)
def _sacrebleu() -> BLEU:
    return BLEU(effective_order=True)
