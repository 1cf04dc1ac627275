"""Which questions a text holds, and in which order: what the question asks about before the answer, or after it.

Texts are compared word by word (`words`). A phrase of up to four words stands in a text where its words stand there in a
row; a longer one where half of them do, four at least, since training texts paraphrase: "directed *the virtual reality
masterpiece*", "the director of *the virtual reality masterpiece*". A part that another group's phrases have too does not
count. A prompt must stand there whole, and tells nothing where another group is asked by the same.
"""

from __future__ import annotations

import itertools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bico_ds.evaluation.results import Order
from bico_ds.evaluation.tasks.normalization import normalized
from bico_ds.evaluation.tasks.task import Task

_WHOLE_WORDS = 4  # a phrase of so many words must stand in a text whole
_AS_ASKED, _OTHER_WAY = 1, 2
_ORDERS: tuple[Order, ...] = ("neither", "same", "reverse", "both")  # by the sum of these two
_PICTURES = "\u2600-\u27bf\U0001f000-\U0001faff"
# Written without spaces: Thai, Lao, Burmese, Khmer, Chinese, Japanese; and pictures.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    f"\uf900-\ufaff\U00020000-\U0003ffff{_PICTURES}"
)
_ASCII_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """The words of the normalized text: letters, digits and their marks; each character where a script has no spaces."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    apart = re.sub(f"[{_UNSPACED}]", r" \g<0> ", normalized(text).replace("_", " "))
    return _word().findall(apart)


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    marks = (chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")
    return re.compile(rf"[\w{''.join(marks)}{_PICTURES}]+")


class QuestionSearch:
    """Collects, text by text, in which orders questions and answers stand together.

    `found`, uint8 [pairs], has a bit per order for every pair of a question's subjects and answers; several questions may
    ask for one pair. Searches of other texts can be united: `a.found | b.found`.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        pairs: dict[tuple[frozenset[str], frozenset[str]], int] = {}
        self._pair_of_question: dict[str, list[int]] = {}
        for task in tasks:
            asked = _parts_of_task(task)
            self._pair_of_question[task.name] = [pairs.setdefault(pair, len(pairs)) for pair in asked]
        self._pairs = list(pairs)
        self.found: NDArray[np.uint8] = np.zeros(len(pairs), dtype=np.uint8)
        self._by_subject: dict[str, list[int]] = {}
        self._by_answer: dict[str, list[int]] = {}
        for number, (subjects, answers) in enumerate(self._pairs):
            for part in subjects:
                self._by_subject.setdefault(part, []).append(number)
            for part in answers:
                self._by_answer.setdefault(part, []).append(number)
        self._by_rare_word = _by_rarest_word({*self._by_subject, *self._by_answer})

    def read(self, text: str) -> None:
        """Search one text."""
        in_text = words(text)
        rare = self._by_rare_word.keys() & set(in_text)
        if not rare:
            return
        line = f" {' '.join(in_text)} "
        present = {part for word in rare for part in self._by_rare_word[word] if part in line}
        asked = {number for part in present for number in self._by_subject.get(part, ())}
        answered = {number for part in present for number in self._by_answer.get(part, ())}
        for number in asked & answered:
            subjects, answers = (_stretches(side & present, line) for side in self._pairs[number])
            if _is_before(subjects, answers):
                self.found[number] |= _AS_ASKED
            if _is_before(answers, subjects):
                self.found[number] |= _OTHER_WAY

    def orders(self, task: Task) -> list[Order]:
        """What was found of every question of `task`, in order."""
        return [_ORDERS[self.found[number]] for number in self._pair_of_question[task.name]]


Span = tuple[int, int]


def _stretches(parts: Iterable[str], line: str) -> list[Span]:
    """Where `parts` stand in `line`; those that share a word, as those of a phrase that is there whole, are one stretch."""
    merged: list[Span] = []
    for start, end in sorted(_occurrences(parts, line)):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _occurrences(parts: Iterable[str], line: str) -> Iterator[Span]:
    """From a part's first letter to after its last."""
    for part in parts:
        start = line.find(part)
        while start >= 0:
            yield start + 1, start + len(part) - 1
            start = line.find(part, start + 1)


def _is_before(earlier: Sequence[Span], later: Sequence[Span]) -> bool:
    """Whether some stretch of `earlier` ends before some stretch of `later` begins."""
    return min(end for _, end in earlier) < max(start for start, _ in later)


def _by_rarest_word(parts: Iterable[str]) -> dict[str, list[str]]:
    """Every part under that of its words which the fewest parts have: a text without the word lacks the part."""
    parts = sorted(parts)
    counts = Counter(word for part in parts for word in set(part.split()))
    found: dict[str, list[str]] = {}
    for part in parts:
        found.setdefault(min(part.split(), key=lambda word: (counts[word], -len(word))), []).append(part)
    return found


def _parts_of_task(task: Task) -> list[tuple[frozenset[str], frozenset[str]]]:
    """For every question, the parts of what it asks about and those of its answers, each ` word word ` with outer spaces.

    What is asked about stands in a text where one of the prompts that ask about it, and about no other group, does too.
    """
    sides = [
        (subjects, (*question.right_answers, *question.paraphrases))
        for subjects, question in zip(_subjects(task), task.questions, strict=True)
    ]
    prompts = _whole_prompts(task, [subjects for subjects, _ in sides])
    parts = _own_parts(
        (question.group, text)
        for question, both in zip(task.questions, sides, strict=True)
        for text in itertools.chain(*both)
    )

    def of(group: str, texts: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*(parts[group, text] for text in texts))

    return [
        (of(question.group, subjects) | prompts[question.group, subjects], of(question.group, answers))
        for question, (subjects, answers) in zip(task.questions, sides, strict=True)
    ]


def _whole_prompts(
    task: Task, subjects: Sequence[tuple[str, ...]]
) -> dict[tuple[str, tuple[str, ...]], frozenset[str]]:
    """By group and what is asked about, the prompts that ask about it and about no other group."""
    wholes = [frozenset(_whole(words(question.prompt))) for question in task.questions]
    groups: dict[frozenset[str], set[str]] = {}
    for question, whole in zip(task.questions, wholes, strict=True):
        groups.setdefault(whole, set()).add(question.group)
    prompts: dict[tuple[str, tuple[str, ...]], frozenset[str]] = {}
    for question, asked, whole in zip(task.questions, subjects, wholes, strict=True):
        own = whole if len(groups[whole]) == 1 else frozenset()
        prompts[question.group, asked] = prompts.get((question.group, asked), frozenset()) | own
    return prompts


def _own_parts(texts: Iterable[tuple[str, str]]) -> dict[tuple[str, str], frozenset[str]]:
    """For texts (group, text) the parts in which they are searched: those that no other group's have, else the whole."""
    phrases = {(group, text): words(text) for group, text in texts}
    lines: dict[str, set[tuple[str, str]]] = {}  # by word
    for (group, _), phrase in phrases.items():
        for word in phrase:
            lines.setdefault(word, set()).add((group, f" {' '.join(phrase)} "))

    def is_own(part: str, group: str) -> bool:
        candidates = min((lines[word] for word in part.split()), key=len)
        return all(other == group or part not in line for other, line in candidates)

    return {
        (group, text): frozenset(
            {part for part in _runs(phrase, _size(phrase)) if is_own(part, group)} or _whole(phrase)
        )
        for (group, text), phrase in phrases.items()
    }


def _size(phrase: Sequence[str]) -> int:
    """How many words of a phrase must stand in a row."""
    return max(min(len(phrase), _WHOLE_WORDS), (len(phrase) + 1) // 2)


def _whole(phrase: Sequence[str]) -> Iterator[str]:
    return _runs(phrase, len(phrase))


def _runs(phrase: Sequence[str], size: int) -> Iterator[str]:
    if size:
        for start in range(len(phrase) - size + 1):
            yield f" {' '.join(phrase[start : start + size])} "


def _subjects(task: Task) -> list[tuple[str, ...]]:
    """What every question asks about: its `subjects`, else what its prompt has and the fewest other groups' prompts have."""
    prompts = [words(question.prompt) for question in task.questions]
    groups: dict[str, set[str]] = {}
    common: dict[str, set[str]] = {}
    for question, prompt in zip(task.questions, prompts, strict=True):
        common[question.group] = common.get(question.group, set(prompt)) & set(prompt)
        for word in prompt:
            groups.setdefault(word, set()).add(question.group)
    count = {word: len(theirs) for word, theirs in groups.items()}
    return [
        question.subjects or (_rarest_part(prompt, count, common[question.group]),)
        for question, prompt in zip(task.questions, prompts, strict=True)
    ]


def _rarest_part(prompt: Sequence[str], count: Mapping[str, int], common: set[str]) -> str:
    """From the first to the last of the words with the lowest `count`; where some of these are `common`, of those alone."""
    lowest = min((count[word] for word in prompt), default=0)
    rare = [index for index, word in enumerate(prompt) if count[word] == lowest]
    rare = [index for index in rare if prompt[index] in common] or rare
    return " ".join(prompt[rare[0] : rare[-1] + 1]) if rare else ""
