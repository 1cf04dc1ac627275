"""Read JSONL files of test records, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError, did_you_mean


def read_objects(path: Path, *, fields: Iterable[str]) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank; `fields`: those it should have, for messages.

    Raises `UserError` for a file that is missing, empty or not UTF-8, and for a line that is no JSON object.
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
        raise UserError(f"{path}: no records; an evaluation task needs at least one")
    return objects


def read_fields(
    path: Path, *, required: Iterable[str], optional: Iterable[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """(line number, fields) of every record; fields that are not named are ignored.

    Raises `UserError`, with the line, where a required field is missing, no text, or nothing but white space.
    """
    required, optional = tuple(required), tuple(optional)
    records = []
    for number, record in read_objects(path, fields=required):
        texts = require_texts(record, required, f"{path}:{number}")
        texts |= {name: str(record[name]) for name in optional if record.get(name) is not None}
        records.append((number, texts))
    return records


def require_texts(record: Any, fields: Iterable[str], where: str) -> dict[str, str]:
    """The named fields of `record`, each a text that is not empty; else a `UserError` that begins with `where`."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    for name in fields:
        if name not in record:
            guess = did_you_mean(name, record)
            found = f"{', '.join(record):.200}" or "no field"
            raise UserError(f"{where}: field '{name}' is missing{guess}; found {found}")
        if not isinstance(record[name], str) or not record[name].strip():
            raise UserError(
                f"{where}: field '{name}' must be a text that is not empty, found {record[name]!r:.100}"
            )
        try:
            record[name].encode()
        except UnicodeEncodeError as error:  # JSON can escape half a character; no tokenizer takes it
            raise UserError(
                f"{where}: field '{name}' has a lone surrogate at character {error.start + 1}"
            ) from error
    return {name: record[name] for name in fields}


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object on a line; else a `UserError` that begins with `where`."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # the latter for a number of thousands of digits
        raise UserError(
            f"{where}: not valid JSON (nested too deeply, or a number of thousands of digits)"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record
