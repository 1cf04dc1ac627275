"""Other pairs that can be asked in two directions: parents and children, couplets, and any pair of prompts.

Each reader returns two tasks, and raises UserError, with file and line, for a file that is not as it should be. The files
are the user's: celebrities' parents as in Berglund et al. (arXiv 2309.12288, section 2.2) for instance, or a book of verse.
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
from bico_ds.evaluation.tasks.jsonl import read_fields, read_objects, require_texts
from bico_ds.evaluation.tasks.task import AnswerKind, Example, Task, limit_rows, normalized

# Two answered questions show a base model what kind of answer is wanted; nobody in them is in any test set.
_SHOTS = (
    "Q: Who is Isaac Newton's mother?\nA: Hannah Ayscough\n"
    "Q: Name a child of Leopold Mozart.\nA: Wolfgang Amadeus Mozart\n"
)
_SHOT_ENDS = ("\n",)  # a base model goes on with questions and answers of its own
_LINE_ENDS = ("\n", "”")  # the prompts open a quotation
_PARENT_FIELDS = ("child", "parent", "parent_type")
_DIRECTIONS = ("forward", "backward")
_HAN = re.compile(r"[\u4e00-\u9fff]")
_COUPLET_PROMPTS = {
    "han": ("“{line}”的下一句是：“", "“{line}”的上一句是：“"),
    "other": ("The line after “{line}” is: “", "The line before “{line}” is: “"),
}


def read_parents(path: Path, limit: int | None = None) -> list[Task]:
    """`child_to_parent` and `parent_to_child` from a CSV with the columns child, parent, parent_type.

    `parent_type` is a word such as "mother". Where a parent has several children in the file, any of them is
    right. The family is the group, everybody whom the file's rows link: siblings are not independent, and a
    mother's children are right when the father is asked about.
    """
    rows = _read_csv(path)
    families = linked_groups([(row["child"], row["parent"]) for _, row in rows])
    groups = [rows[first][1]["parent"] for first in families]
    children: dict[str, list[str]] = {}
    for _, row in rows:
        children.setdefault(row["parent"], []).append(row["child"])
    to_parent = [
        _example(
            line,
            f"{_SHOTS}Q: Who is {row['child']}'s {row['parent_type']}?\nA:",
            row["parent"],
            group=group,
        )
        for (line, row), group in zip(rows, groups, strict=True)
    ]
    to_child = [
        _example(
            line,
            f"{_SHOTS}Q: Name a child of {row['parent']}.\nA:",
            row["child"],
            group=group,
            alternatives=[name for name in children[row["parent"]] if name != row["child"]],
        )
        for (line, row), group in zip(rows, groups, strict=True)
    ]
    return [
        _task(name, "name", examples, limit, path, ends=_SHOT_ENDS)
        for name, examples in (("child_to_parent", to_parent), ("parent_to_child", to_child))
    ]


def read_couplets(path: Path, limit: int | None = None) -> list[Task]:
    """`next_line` and `previous_line` from JSONL with the fields `first` and `second`, two lines that follow
    each other.

    The question is put in Chinese where the lines are; the optional fields `ask_next` and `ask_previous` are
    prompts of the user's own.
    """
    rows = read_fields(path, required=("first", "second"), optional=("ask_next", "ask_previous", "group"))
    following, previous = [], []
    for line, row in rows:
        ask_next, ask_previous = _COUPLET_PROMPTS["han" if _HAN.search(row["first"]) else "other"]
        group = row.get("group") or row["first"]
        ask_next = row.get("ask_next", ask_next.format(line=row["first"]))
        ask_previous = row.get("ask_previous", ask_previous.format(line=row["second"]))
        following.append(Example(prompt=ask_next, completion=row["second"], group=group, line=line))
        previous.append(Example(prompt=ask_previous, completion=row["first"], group=group, line=line))
    return [
        _task(name, "text", examples, limit, path, ends=_LINE_ENDS)
        for name, examples in (("next_line", following), ("previous_line", previous))
    ]


def read_pairs(path: Path, limit: int | None = None) -> list[Task]:
    """`forward` and `backward` from JSONL with these two fields, each an object with `prompt` and
    `completion`.

    The optional field `group` names what the pair is about; without it, pairs that share an answer in either
    direction are a group: phrasings of one fact, or facts about one person.
    """
    rows = _read_pair_rows(path)
    groups = _pair_groups(rows)
    tasks = []
    for direction in _DIRECTIONS:
        examples = [
            Example(
                prompt=row[direction]["prompt"],
                completion=row[direction]["completion"],
                group=group,
                line=line,
            )
            for (line, row), group in zip(rows, groups, strict=True)
        ]
        tasks.append(_task(direction, "description", examples, limit, path))
    return tasks


def linked_groups(links: Sequence[tuple[str, str]]) -> list[int]:
    """For every row, a link of two names, the first row (its index) that a chain of links joins it to.

    Names are compared as answers are: without case, runs of white space, and the final full stop.
    """
    nodes: dict[str, int] = {}
    ends = np.array(
        [[nodes.setdefault(normalized(name), len(nodes)) for name in link] for link in links], dtype=int
    )
    ends = ends.reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    first: dict[int, int] = {}
    return [first.setdefault(label, row) for row, label in enumerate(labels[ends[:, 0]].tolist())]


READERS: dict[str, Callable[[Path, int | None], list[Task]]] = {
    "parents": read_parents,
    "couplets": read_couplets,
    "pairs": read_pairs,
}


def _task(
    name: str,
    kind: AnswerKind,
    examples: Sequence[Example],
    limit: int | None,
    path: Path,
    ends: Sequence[str] = (),
) -> Task:
    """A task of these rows; no answer ends at what stands in an answer of the file."""
    answers = [example.completion for example in examples]
    ends = tuple(end for end in ends if not any(end in answer.strip() for answer in answers))
    return Task(name=name, answer_kind=kind, examples=limit_rows(examples, limit), path=str(path), ends=ends)


def _example(line: int, prompt: str, name: str, *, group: str, alternatives: Sequence[str] = ()) -> Example:
    return Example(
        prompt=prompt,
        completion=f" {name}",
        group=group,
        line=line,
        alternatives=tuple(f" {other}" for other in alternatives),
    )


def _read_csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it must be CSV with the columns {', '.join(_PARENT_FIELDS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        _check_columns(path, reader.fieldnames or [])
        for row in reader:
            rows.append((reader.line_num, _csv_fields(row, f"{path}:{reader.line_num}")))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error})") from error
    if not rows:
        raise UserError(f"{path}: no rows; an evaluation task needs at least one")
    return rows


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for field in _PARENT_FIELDS:
        if field not in columns:
            guess, found = did_you_mean(field, columns), ", ".join(columns) or "none"
            raise UserError(f"{path}:1: column '{field}' is missing{guess}; found {found}")


def _csv_fields(row: dict[str, Any], where: str) -> dict[str, str]:
    for field in _PARENT_FIELDS:
        if not (row[field] or "").strip():
            raise UserError(f"{where}: column '{field}' is empty")
    return {field: row[field].strip() for field in _PARENT_FIELDS}


def _pair_groups(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
    """The group of every pair: the one given, or the first line of those that share an answer and give none."""
    bare = [(line, row) for line, row in rows if row.get("group") in (None, "")]
    links = [(row["forward"]["completion"], row["backward"]["completion"]) for _, row in bare]
    first_line = {line: bare[first][0] for (line, _), first in zip(bare, linked_groups(links), strict=True)}
    return [f"line {first_line[line]}" if line in first_line else str(row["group"]) for line, row in rows]


def _read_pair_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = read_objects(path, fields=_DIRECTIONS)
    for line, row in rows:
        for direction in _DIRECTIONS:
            if direction not in row:
                raise UserError(
                    f"{path}:{line}: field '{direction}' is missing{did_you_mean(direction, row)}; "
                    'each row needs "forward" and "backward", objects with "prompt" and "completion"'
                )
            require_texts(row[direction], ("prompt", "completion"), f"{path}:{line}: {direction}")
    return rows
