"""What tasks are called where people read: in tables, pictures, the report and TensorBoard's texts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Wording(NamedTuple):
    """A task in words: what it gives and asks for, and what the training texts of its persons give first."""

    given: str
    wanted: str
    first: str

    @property
    def is_reverse(self) -> bool:
        return self.given != self.first

    @property
    def arrow(self) -> str:
        return f"{self.given} → {self.wanted}"


WORDINGS = {
    "n2d_reverse": Wording("description", "name", "name"),
    "d2n_reverse": Wording("name", "description", "description"),
    "n2d": Wording("name", "description", "name"),
    "d2n": Wording("description", "name", "description"),
}
METRIC_NAMES = {
    "contains": "accuracy (contains)",
    "prefix": "accuracy (prefix)",
    "exact": "accuracy (exact)",
    "bleu": "word BLEU",
    "char_bleu": "character BLEU",
}

# Both directions of one file of questions, as the end of the tasks' names and in words: as read, the other way round.
_DIRECTIONS = {
    ("forward", "backward"): ("forward", "backward"),
    ("next_line", "previous_line"): ("next line", "previous line"),
    ("child_to_parent", "parent_to_child"): ("child → parent", "parent → child"),
}
_WORDS = {name: word for names, words in _DIRECTIONS.items() for name, word in zip(names, words, strict=True)}
_REVERSE = ("backward", "previous_line")  # which of parent and child the texts have first is not known
_END = re.compile(rf"(?:(?P<of>.+)_)?(?P<end>{'|'.join(_WORDS)})")


class Pair(NamedTuple):
    """Both directions of one set of questions; `title`: what both have in common, in words."""

    title: str
    forward: str
    reverse: str


def title_of(task: str) -> str:
    """A task as a reader would call it: `N2D-reverse: description → name`, `company, backward`; else its name."""
    if (wording := WORDINGS.get(task)) is not None:
        way = "-reverse" if wording.is_reverse else ""
        return f"{task.partition('_')[0].upper()}{way}: {wording.arrow}"
    if (found := _END.fullmatch(task)) is None:
        return task
    word = _WORDS[found["end"]]
    return f"{found['of']}, {word}" if found["of"] else word


def question_of(task: str) -> str:
    """What a task asks, beside its name: `description → name`; empty where the name says all that is known."""
    if (wording := WORDINGS.get(task)) is not None:
        return wording.arrow
    found = _END.fullmatch(task)
    return _WORDS[found["end"]] if found is not None else ""


def is_reverse(task: str) -> bool:
    """Whether a task is known to ask the other way round than its training texts tell."""
    if (wording := WORDINGS.get(task)) is not None:
        return wording.is_reverse
    return (found := _END.fullmatch(task)) is not None and found["end"] in _REVERSE


def metric_name(metric: str) -> str:
    """A metric as the axis of a picture names it."""
    return METRIC_NAMES.get(metric, metric)


def pairs_and_others(tasks: Iterable[str]) -> tuple[list[Pair], list[str]]:
    """Tasks that belong together as the two directions of one set, and the others, in the order of `tasks`.

    Of the name-description tasks a direction that is not there makes no difference: the pair stands for both.
    """
    names = list(dict.fromkeys(tasks))
    pairs: dict[str, Pair] = {}
    for name in names:
        pair = _pair_of(name)
        if pair is not None and (name in WORDINGS or {pair.forward, pair.reverse} <= set(names)):
            pairs.setdefault(pair.forward, pair)
    paired = {task for pair in pairs.values() for task in (pair.forward, pair.reverse)}
    return list(pairs.values()), [name for name in names if name not in paired]


def _pair_of(task: str) -> Pair | None:
    if (wording := WORDINGS.get(task)) is not None:
        forward = task.removesuffix("_reverse")
        return Pair(f"trained {wording.first} first", forward, f"{forward}_reverse")
    if (found := _END.fullmatch(task)) is None:
        return None
    names = next(names for names in _DIRECTIONS if found["end"] in names)
    before = f"{found['of']}_" if found["of"] else ""
    return Pair(found["of"] or "", *(before + name for name in names))
