"""Shards to records: what each line, or each row of a table, holds.

Lines and Parquet have readers of our own, since a message about a bad line must name file and line.
"""

from __future__ import annotations

import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bico_ds.common.errors import UserError
from bico_ds.data.prepare.input_files import open_lines, open_parquet
from bico_ds.data.prepare.shards import Shard


class BadRecord(ValueError):
    """A record that cannot become a document. `reason` is the class that it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def read_records(shard: Shard, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | BadRecord, Any]]:
    """Yield (number of the record, the record or what is wrong with it, its raw content for the file of skipped ones).

    Blank lines are no records. Raises `UserError` for a file that lacks a column, is damaged, or changed since its shards
    were planned.
    """
    shard.check_unchanged()
    if shard.kind == "parquet":
        yield from _parquet_records(shard, columns)
    elif shard.kind == "arrow":
        yield from _arrow_records(shard, columns)
    else:
        yield from _line_records(shard, columns)
    shard.check_unchanged()


def _parquet_records(
    shard: Shard, columns: list[str]
) -> Iterator[tuple[int, dict[str, Any] | BadRecord, Any]]:
    file = open_parquet(shard.path)
    _check_columns(shard.path, columns, file.schema_arrow.names)
    groups = list(range(shard.start, shard.end))
    number = shard.first_record
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
            for record in batch.to_pylist():
                yield number, record, record
                number += 1
    except (OSError, ValueError) as error:
        raise UserError(f"{shard.where(number)}: damaged Parquet file ({error})") from error


def _arrow_records(shard: Shard, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | BadRecord, Any]]:
    import pyarrow

    table = pyarrow.ipc.open_stream(pyarrow.memory_map(shard.path)).read_all()
    _check_columns(shard.path, columns, table.column_names)
    part = table.select(columns).slice(shard.start, shard.end - shard.start)
    number = shard.first_record
    for batch in part.to_batches(max_chunksize=1024):
        for record in batch.to_pylist():
            yield number, record, record
            number += 1


def _check_columns(path: str, wanted: list[str], there: list[str]) -> None:
    if missing := [name for name in wanted if name not in there]:
        raise UserError(f"{path} has no column '{missing[0]}'; its columns are {', '.join(sorted(there))}")


def _line_records(shard: Shard, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | BadRecord, Any]]:
    if shard.kind == "text_file":
        raw = b"".join(line for _, line in _raw_lines(shard))
        yield 1, _text_record(raw.removeprefix(BOM_UTF8), columns[0]), raw
    elif shard.kind == "text_lines":
        for number, raw in _raw_lines(shard):
            text = raw.removeprefix(BOM_UTF8) if number == 1 else raw
            record = _text_record(text.rstrip(b"\r\n"), columns[0])
            if isinstance(record, BadRecord) or not _is_blank(record[columns[0]]):
                yield number, record, raw
    else:
        for number, raw in _raw_lines(shard):
            if not raw.isspace():
                yield number, _json_record(raw), raw


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _raw_lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line with its end). Damage of a compressed file is named with the last line read."""
    number = shard.first_record
    try:
        with open_lines(Path(shard.path)) as file:
            if shard.start:
                file.seek(shard.start)
            left = shard.end - shard.start if shard.end >= 0 else -1
            for line in file:
                yield number, line
                number += 1
                left -= len(line)
                if left == 0:
                    return
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{shard.where(number)}: cannot read on, the file is damaged ({error})") from error
    if left > 0:
        raise UserError(f"{shard.path} became shorter while it was being read: run again when it is complete")


_parse_json = json.JSONDecoder().raw_decode


def _json_record(raw: bytes) -> dict[str, Any] | BadRecord:
    raw = raw.rstrip(b"\r\n")
    try:
        text = raw.decode()
        if text.startswith("{"):  # `json.loads` takes twice as long to look for white space around
            record, end = _parse_json(text)
            if end == len(text):
                return record
        record = json.loads(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return BadRecord("invalid UTF-8", f"byte {error.start + 1} of the line is 0x{raw[error.start]:02x}")
    except json.JSONDecodeError as error:
        hint = "; is this a JSON array? One object per line is needed" if raw.lstrip()[:1] == b"[" else ""
        return BadRecord("broken JSON", f"{error.msg} at column {error.pos + 1}{hint}")
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        return BadRecord("broken JSON", str(error))
    if not isinstance(record, dict):
        return BadRecord("broken JSON", f"expected an object, found {type(record).__name__}")
    return record


def _text_record(raw: bytes, column: str) -> dict[str, Any] | BadRecord:
    try:
        return {column: raw.decode("utf-8")}
    except UnicodeDecodeError as error:
        return BadRecord("invalid UTF-8", f"byte {error.start + 1} is 0x{raw[error.start]:02x}")
