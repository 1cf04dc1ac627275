"""JSONL files of test rows, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError, did_you_mean


def read_objects(path: Path, *, fields: Iterable[str]) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank; `fields`: what belongs there, for messages.

    Raises UserError for a file that is missing, empty or not UTF-8, and a line that is no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; it must be JSONL with the fields {', '.join(fields)}")
    objects = []
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    objects.append((number, parse_object(line, f"{path}:{number}")))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not objects:
        raise UserError(f"{path}: no rows; an evaluation task needs at least one")
    return objects


def read_fields(
    path: Path, *, required: Iterable[str], optional: Iterable[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """(line number, fields) of every row; other fields than those named are ignored.

    Every required field must be a text with something other than white space in it. Raises UserError, with the line.
    """
    required, optional = tuple(required), tuple(optional)
    rows = []
    for number, row in read_objects(path, fields=required):
        texts = require_texts(row, required, f"{path}:{number}")
        texts |= {name: str(row[name]) for name in optional if row.get(name) is not None}
        rows.append((number, texts))
    return rows


def require_texts(row: Any, fields: Iterable[str], where: str) -> dict[str, str]:
    """The named fields of `row`, each a text that is not empty; else a UserError that begins with `where`."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for name in fields:
        if name not in row:
            guess = did_you_mean(name, row)
            found = ", ".join(row) or "no field"
            raise UserError(f"{where}: field '{name}' is missing{guess}; found {found}")
        if not isinstance(row[name], str) or not row[name].strip():
            raise UserError(f"{where}: field '{name}' must be a text that is not empty, found {row[name]!r}")
    return {name: row[name] for name in fields}


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object on a line; else a UserError that begins with `where`."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row
