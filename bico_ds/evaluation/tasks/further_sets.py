"""Files of questions: those that can be asked in two directions (parents, couplets, any pairs of prompts), and any others.

Each reader returns one task per direction, and raises `UserError`, with file and line, for a malformed file. The files are
the user's: celebrities' parents as in Berglund et al. (arXiv 2309.12288, section 2.2), for instance, or a book of verse.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from bico_ds.common.errors import UserError, did_you_mean
from bico_ds.config.sections.evaluation import DIRECTIONS
from bico_ds.evaluation.tasks.jsonl import read_fields, read_objects, require_texts
from bico_ds.evaluation.tasks.normalization import normalized, plain_form
from bico_ds.evaluation.tasks.task import AnswerKind, Question, Task, limit_questions

# Two answered questions show a base model what kind of answer is wanted. Their persons are in no test set.
_SHOTS = (
    "Q: Who is Isaac Newton's mother?\nA: Hannah Ayscough\n"
    "Q: Name a child of Leopold Mozart.\nA: Wolfgang Amadeus Mozart\n"
)
_SHOT_ENDS = ("\n",)  # a base model continues with questions and answers of its own
_LINE_ENDS = ("\n", "”")  # the prompts open a quotation
_PARENT_FIELDS = ("child", "parent", "parent_type")
_DIRECTIONS = DIRECTIONS["pairs"]
_ANSWERS = ("answer", "completion")
_ASKED = ("prompt", _ANSWERS[0])
_HAN = re.compile(r"[\u4e00-\u9fff]")
_COUPLET_PROMPTS = {
    "han": ("“{line}”的下一句是：“", "“{line}”的上一句是：“"),
    "other": ("The line after “{line}” is: “", "The line before “{line}” is: “"),
}


def read_parents(path: Path, limit: int | None = None) -> list[Task]:
    """`child_to_parent` and `parent_to_child` from a CSV with the columns child, parent, parent_type.

    `parent_type` is a word such as "mother". Where a parent has several children in the file, any of them is right. A group
    is a family, all persons whom the file links: siblings are not independent, and a mother's children are right answers
    about the father too.
    """
    records = _read_csv(path)
    families = linked_groups([(record["child"], record["parent"]) for _, record in records])
    groups = [plain_form(records[first][1]["parent"]) for first in families]
    children: dict[str, list[str]] = {}
    for _, record in records:
        children.setdefault(normalized(record["parent"]), []).append(record["child"])
    to_parent = [
        _question(
            line,
            f"{_SHOTS}Q: Who is {record['child']}'s {record['parent_type']}?\nA:",
            record["parent"],
            group=group,
            subject=record["child"],
        )
        for (line, record), group in zip(records, groups, strict=True)
    ]
    to_child = [
        _question(
            line,
            f"{_SHOTS}Q: Name a child of {record['parent']}.\nA:",
            record["child"],
            group=group,
            subject=record["parent"],
            alternatives=[
                name
                for name in children[normalized(record["parent"])]
                if normalized(name) != normalized(record["child"])
            ],
        )
        for (line, record), group in zip(records, groups, strict=True)
    ]
    return [
        _task(name, "name", questions, limit, path, ends=_SHOT_ENDS)
        for name, questions in zip(DIRECTIONS["parents"], (to_parent, to_child), strict=True)
    ]


def read_couplets(path: Path, limit: int | None = None) -> list[Task]:
    """`next_line` and `previous_line` from JSONL with the fields `first` and `second`, two lines that follow each other.

    The question is in Chinese where `first` is. The optional fields `ask_next` and `ask_previous` replace the prompts.
    """
    records = read_fields(path, required=("first", "second"), optional=("ask_next", "ask_previous", "group"))
    following: list[Question] = []
    previous: list[Question] = []
    for line, record in records:
        ask_next, ask_previous = _COUPLET_PROMPTS["han" if _HAN.search(record["first"]) else "other"]
        group = plain_form(record.get("group") or record["first"])
        ask_next = record.get("ask_next", ask_next.format(line=record["first"]))
        ask_previous = record.get("ask_previous", ask_previous.format(line=record["second"]))
        for questions, prompt, answer, subject in (
            (following, ask_next, record["second"], record["first"]),
            (previous, ask_previous, record["first"], record["second"]),
        ):
            question = Question(prompt=prompt, completion=answer, group=group, line=line, subjects=(subject,))
            questions.append(question)
    return [
        _task(name, "text", questions, limit, path, ends=_LINE_ENDS)
        for name, questions in zip(DIRECTIONS["couplets"], (following, previous), strict=True)
    ]


def read_pairs(path: Path, limit: int | None = None) -> list[Task]:
    """`forward` and `backward` from JSONL with these two fields, each an object with `prompt` and `completion`.

    The optional field `group` names what the pair is about. Without it, pairs that share an answer in either direction are
    one group: several wordings of one statement, or statements about one person.
    """
    records = _read_pair_records(path)
    groups = _pair_groups(records)
    tasks = []
    for direction, opposite in (_DIRECTIONS, _DIRECTIONS[::-1]):
        questions = [
            Question(
                prompt=record[direction]["prompt"],
                completion=record[direction]["completion"],
                group=group,
                line=line,
                subjects=(record[opposite]["completion"],),
            )
            for (line, record), group in zip(records, groups, strict=True)
        ]
        tasks.append(_task(direction, "description", questions, limit, path))
    return tasks


def read_questions(path: Path, limit: int | None = None) -> list[Task]:
    """`questions` from JSONL with `prompt` and `answer`, which `completion` may take the place of.

    A `completion` follows its prompt as it is, which matters to the log-probability test; before an `answer` comes a space,
    unless there is one, or the answer is Chinese. Optional fields: `group`, what the question is about (without it, all
    questions with one answer are a group), and `subject`, what the prompt asks about, for the search in training texts.
    """
    questions = [
        _read_question(record, f"{path}:{line}", line) for line, record in read_objects(path, fields=_ASKED)
    ]
    return [_task("questions", "description", questions, limit, path)]


def _read_question(record: dict[str, Any], where: str, line: int) -> Question:
    keys = [key for key in _ANSWERS if record.get(key) is not None]
    if len(keys) == 2:
        raise UserError(f"{where}: 'answer' and 'completion' are two words for one thing; give one of them")
    key = keys[0] if keys else _ANSWERS[0]
    texts = require_texts(record, ("prompt", key), where)
    group, subject = ("" if record.get(key) is None else str(record[key]) for key in ("group", "subject"))
    return Question(
        prompt=texts["prompt"],
        completion=texts[key] if key == "completion" else _after(texts["prompt"], texts[key]),
        group=plain_form(group) or normalized(texts[key]),
        line=line,
        subjects=(subject,) if subject.strip() else (),
    )


def _after(prompt: str, answer: str) -> str:
    is_joined = prompt[-1].isspace() or answer[0].isspace() or _HAN.match(answer)
    return answer if is_joined else f" {answer}"


def linked_groups(links: Sequence[tuple[str, str]]) -> list[int]:
    """For every link between two names, the index of the first link in its group; links with a name in common form a group.

    Names are compared as answers are (`normalized`).
    """
    nodes: dict[str, int] = {}
    ends = np.array(
        [[nodes.setdefault(normalized(name), len(nodes)) for name in link] for link in links], dtype=int
    )
    ends = ends.reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    first: dict[int, int] = {}
    return [first.setdefault(label, index) for index, label in enumerate(labels[ends[:, 0]].tolist())]


READERS: dict[str, Callable[[Path, int | None], list[Task]]] = {
    "parents": read_parents,
    "couplets": read_couplets,
    "pairs": read_pairs,
    "questions": read_questions,
}


def _task(
    name: str,
    kind: AnswerKind,
    questions: Sequence[Question],
    limit: int | None,
    path: Path,
    ends: Sequence[str] = (),
) -> Task:
    """A task of these questions; of `ends`, those that some answer of the file contains are left out."""
    answers = [question.completion for question in questions]
    ends = tuple(end for end in ends if not any(end in answer.strip() for answer in answers))
    return Task(
        name=name, answer_kind=kind, questions=limit_questions(questions, limit), path=str(path), ends=ends
    )


def _question(
    line: int, prompt: str, name: str, *, group: str, subject: str, alternatives: Sequence[str] = ()
) -> Question:
    return Question(
        prompt=prompt,
        completion=f" {name}",
        group=group,
        line=line,
        alternatives=tuple(f" {other}" for other in alternatives),
        subjects=(subject,),
    )


def _read_csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it must be CSV with the columns {', '.join(_PARENT_FIELDS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    records = []
    try:
        _check_columns(path, reader.fieldnames or [])
        for record in reader:
            records.append((reader.line_num, _csv_fields(record, f"{path}:{reader.line_num}")))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error})") from error
    if not records:
        raise UserError(f"{path}: no records; an evaluation task needs at least one")
    return records


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for field in _PARENT_FIELDS:
        if field not in columns:
            guess, found = did_you_mean(field, columns), ", ".join(columns) or "none"
            raise UserError(f"{path}:1: column '{field}' is missing{guess}; found {found}")


def _csv_fields(record: dict[str, Any], where: str) -> dict[str, str]:
    for field in _PARENT_FIELDS:
        if not (record[field] or "").strip():
            raise UserError(f"{where}: column '{field}' is empty")
    return {field: record[field].strip() for field in _PARENT_FIELDS}


def _pair_groups(records: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
    """The group of every pair: the one given, else the first line of the pairs without one that share an answer."""
    bare = [(line, record) for line, record in records if record.get("group") in (None, "")]
    links = [(record["forward"]["completion"], record["backward"]["completion"]) for _, record in bare]
    first_line = {line: bare[first][0] for (line, _), first in zip(bare, linked_groups(links), strict=True)}
    return [
        f"line {first_line[line]}" if line in first_line else plain_form(str(record["group"]))
        for line, record in records
    ]


def _read_pair_records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    records = read_objects(path, fields=_DIRECTIONS)
    for line, record in records:
        for direction in _DIRECTIONS:
            if direction not in record:
                raise UserError(
                    f"{path}:{line}: field '{direction}' is missing{did_you_mean(direction, record)}; "
                    'each record needs "forward" and "backward", objects with "prompt" and "completion"'
                )
            require_texts(record[direction], ("prompt", "completion"), f"{path}:{line}: {direction}")
    return records
