"""Shards to records: what each line, or each row of a table, holds.

Lines and Parquet have readers of our own, since a message about a bad line must name file and line.
"""

from __future__ import annotations

import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bico_ds.common.errors import UserError
from bico_ds.data.prepare.input_files import most_bytes_of, open_lines, open_parquet, printable
from bico_ds.data.prepare.shards import Shard

# A line, or a file that is one document. Its text and tokens take several times as much memory.
MOST_RECORD_BYTES = 1 << 28
_PART_BYTES = 1 << 22
_KEPT_BYTES = 1000  # of a line that is too long, in the file of skipped ones
# Of a compressed file, on average at least: a bomb of empty lines takes longer than one of as many bytes.
_BYTES_OF_LINE = 64
_MOST_DETAIL = 2000


class BadRecord(ValueError):
    """A record that cannot become a document. `reason` is the class that it is counted under.

    `detail` may quote the record, or a template's own words: it is cut to a length that can be read, and made printable.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        if len(detail) > _MOST_DETAIL:
            detail = f"{detail[:_MOST_DETAIL]} …"
        super().__init__(printable(f"{reason}: {detail}" if detail else reason))
        self.reason = reason


def check_unicode(text: str, what: str) -> str:
    """Return the text. Raises `BadRecord` where UTF-8 cannot write it: JSON can escape half a character."""
    if not text.isascii():  # a flag of the string, no look at its characters
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"{what} has a lone surrogate at character {error.start + 1}"
            raise BadRecord("invalid UTF-8", where) from None
    return text


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
        raise UserError(
            f"{shard.where(number)}: damaged Parquet file ({' '.join(str(error).split())}): fetch or write it again"
        ) from error


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
        raise UserError(
            f"{printable(path)} has no column '{missing[0]}'; its columns are {', '.join(sorted(there))}"
        )


def _line_records(shard: Shard, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | BadRecord, Any]]:
    if shard.kind == "text_file":
        raw = _whole(shard)
        if len(raw) > MOST_RECORD_BYTES:
            yield 1, _too_long("file", "give parts of it, or one document a line"), raw[:_KEPT_BYTES]
        else:
            yield 1, _text_record(raw.removeprefix(BOM_UTF8), columns[0]), raw
    elif shard.kind == "text_lines":
        for number, raw in _raw_lines(shard):
            if len(raw) > MOST_RECORD_BYTES:
                yield number, _too_long("line", "is this a text file, with line ends?"), raw[:_KEPT_BYTES]
                continue
            text = raw.removeprefix(BOM_UTF8) if number == 1 else raw
            record = _text_record(text.rstrip(b"\r\n"), columns[0])
            if isinstance(record, BadRecord) or not _is_blank(record[columns[0]]):
                yield number, record, raw
    else:
        keys = [(name, json.dumps(name).encode()) for name in columns]
        for number, raw in _raw_lines(shard):
            if len(raw) > MOST_RECORD_BYTES:
                detail = "one JSON object per line is needed; split a longer one"
                yield number, _too_long("line", detail), raw[:_KEPT_BYTES]
            elif not raw.isspace():
                yield number, _json_record(raw, keys), raw


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _too_long(what: str, advice: str) -> BadRecord:
    return BadRecord("too long", f"the {what} has more than {MOST_RECORD_BYTES:,} bytes: {advice}")


def _whole(shard: Shard) -> bytes:
    """All of a file, or a little more than `MOST_RECORD_BYTES` of it."""
    parts, size = [], 0
    for _, line in _raw_lines(shard):
        parts.append(line)
        size += len(line)
        if size > MOST_RECORD_BYTES:
            break
    return b"".join(parts)


def _raw_lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line with its end). Damage of a compressed file is named with the last line read.

    Of a line of more than `MOST_RECORD_BYTES` only the begin is yielded, which is longer than that.
    """
    number, read = shard.first_record, 0
    most = most_bytes_of(Path(shard.path), shard.size)
    most_lines = most / _BYTES_OF_LINE
    try:
        with open_lines(Path(shard.path)) as file:
            if shard.start:
                file.seek(shard.start)
            size = shard.end - shard.start if shard.end >= 0 else -1
            while read != size and (line := file.readline(MOST_RECORD_BYTES + 1)):
                yield number, line
                number += 1
                read += len(line)
                if len(line) > MOST_RECORD_BYTES and not line.endswith(b"\n"):
                    read += _pass_over_line(file, most - read)
                if read > most or number - shard.first_record > most_lines:
                    raise UserError(
                        f"{shard.where(number)}: the file of {shard.size:,} bytes becomes more than {most:,}, or more than "
                        f"{most_lines:,.0f} lines, when it is decompressed: is it a bomb? If it is meant, decompress it "
                        "yourself, and give that file"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{shard.where(number)}: cannot read on, the file is damaged ({error}): fetch or compress it again"
        ) from error
    if read < size:
        raise UserError(
            f"{printable(shard.path)} became shorter while it was being read: run again when it is complete"
        )


def _pass_over_line(file: BinaryIO, most: float) -> int:
    """Read to the end of a line, or a little more than `most` bytes, and return how many these were."""
    read = 0
    while read <= most and (part := file.readline(_PART_BYTES)):
        read += len(part)
        if part.endswith(b"\n"):
            break
    return read


_parse_json = json.JSONDecoder().raw_decode


def _json_record(raw: bytes, keys: list[tuple[str, bytes]]) -> dict[str, Any] | BadRecord:
    """The record on a line; `keys`: the fields that count, each also as JSON writes it."""
    raw = raw.rstrip(b"\r\n")
    try:
        for name, key in keys:
            if raw.count(key) > 1 and _stands_twice(raw.decode(), name):
                return BadRecord("broken JSON", f"the key '{name}' stands there twice")
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
    except RecursionError:
        return BadRecord("broken JSON", "nested too deeply")
    except ValueError:
        return BadRecord("broken JSON", "a number of thousands of digits")
    if not isinstance(record, dict):
        return BadRecord("broken JSON", f"expected an object, found {type(record).__name__}")
    return record


def _stands_twice(text: str, name: str) -> bool:
    """Whether a key comes twice in the object on a line: Python would take the last, other programs the first."""
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found[:] = [key for key, _ in pairs]  # of the outermost object at last
        return dict(pairs)

    json.loads(text.removeprefix("\ufeff"), object_pairs_hook=note)
    return found.count(name) > 1


def _text_record(raw: bytes, column: str) -> dict[str, Any] | BadRecord:
    try:
        return {column: raw.decode("utf-8")}
    except UnicodeDecodeError as error:
        return BadRecord("invalid UTF-8", f"byte {error.start + 1} is 0x{raw[error.start]:02x}")
