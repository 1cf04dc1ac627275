"""The four name-description tasks of Berglund et al. (arXiv 2309.12288), read from JSONL files.

======================  ===========  ========  ======================  =====================================
file                    task         prompt    answer                  persons were trained
======================  ===========  ========  ======================  =====================================
p2d_prompts_test        n2d          name      description             name first (forward)
d2p_prompts_test        d2n          descr.    name                    description first (forward)
p2d_reverse_…           n2d_reverse  descr.    name                    name first (reverse)
d2p_reverse_…           d2n_reverse  name      description             description first (reverse)
======================  ===========  ========  ======================  =====================================

A record is a JSON object with `prompt` and `completion`, optionally `group`: the person it asks about. Without `group`, the
person is the answer where that is a name; else the person whose name, known from the companion file, is in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.evaluation.tasks.jsonl import read_fields
from bico_ds.evaluation.tasks.normalization import plain_form, stands_in, strip_answer

AnswerKind = Literal["name", "description", "text"]

_FILES: dict[str, str] = {
    "n2d": "p2d_prompts_test.jsonl",
    "d2n": "d2p_prompts_test.jsonl",
    "n2d_reverse": "p2d_reverse_prompts_test.jsonl",
    "d2n_reverse": "d2p_reverse_prompts_test.jsonl",
}
_ANSWERS: dict[str, AnswerKind] = {
    "n2d": "description",
    "d2n": "name",
    "n2d_reverse": "name",
    "d2n_reverse": "description",
}
# The companion that asks about the same persons in the other direction.
_COMPANIONS = {"n2d": "n2d_reverse", "n2d_reverse": "n2d", "d2n": "d2n_reverse", "d2n_reverse": "d2n"}
_SHORT_ANSWER_WORDS = 3

TASK_NAMES: tuple[str, ...] = tuple(_FILES)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question and its right answers.

    `completion` is as in the file (its leading space belongs to the text); `alternatives` are right too. `group`: the
    person, for statistics. `line` counts from 1.

    For the search in training texts only (`text_search`), where known: `subjects`, what is asked about, in one or more
    wordings: the answers to the questions in the other direction; `paraphrases`: other wordings of the answer.
    """

    prompt: str
    completion: str
    group: str
    line: int
    alternatives: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        return strip_answer(self.completion)

    @property
    def right_answers(self) -> tuple[str, ...]:
        return (self.completion, *self.alternatives)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions of one kind.

    `ends`: texts at which an answer ends, where a model may continue with questions of its own. `metric`: the headline that
    the user asked for. Raises `UserError` for an answer of which nothing is left to compare, since every prediction would
    contain it.
    """

    name: str
    answer_kind: AnswerKind
    questions: tuple[Question, ...]
    path: str
    ends: tuple[str, ...] = ()
    metric: str | None = None

    def __post_init__(self) -> None:
        for question in self.questions:
            for answer in question.right_answers:
                if not strip_answer(answer):
                    raise UserError(
                        f"{self.path}:{question.line}: the answer {answer!r} is nothing but full stops and characters "
                        "that show nothing; give a text that can be right or wrong"
                    )

    @property
    def headline(self) -> str:
        """The metric that tables and plots show for the task: the user's, else what suits the answers."""
        return self.metric or self.suited_metric

    @property
    def suited_metric(self) -> str:
        """The headline where the user asked for none.

        `bleu` (of words) for descriptions of more than three words, as in the paper; `prefix` for answers that are cut at
        their end, so that an echo of the question is not right; else `contains`.
        """
        if self.ends:
            return "prefix"
        longest = max(len(question.answer.split()) for question in self.questions)
        long = self.answer_kind == "description" and longest > _SHORT_ANSWER_WORDS
        return "bleu" if long else "contains"

    @property
    def without_subject(self) -> int:
        """How many questions do not come with what they ask about, so that a search must estimate it from the prompts."""
        return sum(not question.subjects for question in self.questions)

    def __len__(self) -> int:
        return len(self.questions)

    def cut(self, prediction: str) -> str:
        """The prediction up to the first of `ends` after its first word."""
        start = len(prediction) - len(prediction.lstrip())
        positions = (prediction.find(end, start) for end in self.ends)
        return prediction[: min((position for position in positions if position >= 0), default=None)]


def task_file(folder: Path, name: str) -> Path:
    """The file of task `name`; `UserError` for an unknown name."""
    if name not in _FILES:
        raise UserError(
            f"unknown evaluation task '{name}'{did_you_mean(name, _FILES)}; known: {', '.join(_FILES)}. Questions of your "
            "own: {kind: questions, name: NAME, file: FILE}"
        )
    return folder / _FILES[name]


def load_tasks(folder: Path, names: Sequence[str], limit: int | None = None) -> list[Task]:
    """Read tasks `names` from `folder`, at most `limit` prompts of each, spread over the persons.

    Raises `UserError` for an unknown task, a missing or empty file, and a malformed record (with file and line).
    """
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise UserError(f"evaluation tasks named twice: {', '.join(repeated)}")
    return [_load_task(folder, name, limit) for name in names]


def _load_task(folder: Path, name: str, limit: int | None) -> Task:
    path = task_file(folder, name)
    questions = _read_questions(folder, name)
    opposite = (folder / _FILES[_COMPANIONS[name]]).exists()
    subjects = _answers_by_group(_read_questions(folder, _COMPANIONS[name])) if opposite else {}
    paraphrases = _answers_by_group(questions)
    questions = [
        replace(q, subjects=subjects.get(q.group, ()), paraphrases=paraphrases[q.group]) for q in questions
    ]
    return Task(
        name=name,
        answer_kind=_ANSWERS[name],
        questions=limit_questions(questions, limit),
        path=str(path),
    )


def _answers_by_group(questions: Sequence[Question]) -> dict[str, tuple[str, ...]]:
    answers: dict[str, dict[str, None]] = {}
    for question in questions:
        answers.setdefault(question.group, {})[question.answer] = None
    return {group: tuple(wordings) for group, wordings in answers.items()}


def _read_questions(folder: Path, name: str) -> list[Question]:
    """All questions of a file, without what the companion tells of them."""
    records = read_fields(task_file(folder, name), required=("prompt", "completion"), optional=("group",))
    group_of: Callable[[str, str], str]
    if _ANSWERS[name] == "name":
        group_of = lambda prompt, answer: answer  # noqa: E731
    else:
        group_of = _person_finder(folder / _FILES[_COMPANIONS[name]])
    return [
        Question(
            prompt=record["prompt"],
            completion=record["completion"],
            group=plain_form(record.get("group", ""))
            or group_of(record["prompt"], strip_answer(record["completion"])),
            line=line,
        )
        for line, record in records
    ]


def limit_questions(questions: Sequence[Question], limit: int | None) -> tuple[Question, ...]:
    """At most `limit` questions, in their order, as many from each group as from any other, or one more.

    The published files have ten records per person, one per prompt form, one person after the other: their first 60 records
    are 6 persons, and the first two of every person are two of ten forms. So each group starts where the one before it
    ended: all forms are asked as soon as `limit` is as large as their number.
    """
    if limit is None:
        return tuple(questions)
    by_group: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_group.setdefault(question.group, []).append(index)
    each, over = divmod(limit, len(by_group))
    ranked: list[tuple[int, int]] = []
    for number, own in enumerate(by_group.values()):
        start = (number * each + min(number, over)) % len(own)
        ranked += enumerate(own[start:] + own[:start])
    return tuple(questions[index] for index in sorted(index for _, index in sorted(ranked)[:limit]))


def _person_finder(companion: Path) -> Callable[[str, str], str]:
    """Finds the person in a prompt by the names in `companion`; the answer itself where none is found."""
    records = read_fields(companion, required=("prompt", "completion")) if companion.exists() else []
    names = sorted({strip_answer(record["completion"]) for _, record in records}, key=len, reverse=True)

    def find(prompt: str, answer: str) -> str:
        prompt = plain_form(prompt)
        return next((name for name in names if stands_in(name, prompt)), answer)

    return find
