"""Input files to rows: which files, which part of them one worker reads, and what each line says.

Own readers for lines and Parquet, since a message about a bad line must name file and line; `datasets`
fetches what has a hub name, and its Arrow files are read here too.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from bico_ds.common.errors import UserError
from bico_ds.data.store import is_store

Kind = Literal["lines", "text_lines", "text_file", "parquet", "arrow"]
SHARD_BYTES = 32 << 20
_JSON_ENDINGS, _TEXT_ENDINGS = (".jsonl", ".ndjson", ".json"), (".txt", ".text", ".md")
_COMPRESSIONS = (".gz", ".zst")
_ROWS_A_SHARD = 50_000


class BadRow(ValueError):
    """A row that cannot become a document. `reason` is the class it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of one file that one worker reads at a time, and how the file looked when the work was
    planned.
    """

    path: str
    kind: Kind
    size: int  # bytes of the file
    modified_ns: int
    start: int = 0  # bytes (lines), row groups (parquet) or rows (arrow)
    end: int = -1  # -1: to the end
    first_row: int = 1

    def place(self, row: int) -> str:
        """Name a row for people."""
        return f"{self.path}: row {row}" if self.kind in ("parquet", "arrow") else f"{self.path}:{row}"

    def check_unchanged(self) -> None:
        """Raise `UserError` if the file is not what it was when the work was planned."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise UserError(f"{self.path} vanished while it was being read ({error.strerror})") from error
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
            raise UserError(f"{self.path} changed while it was being read: run again when it is complete")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files to read, and by reason the names of what lies beside them and is not read."""

    files: list[Path]
    passed_over: dict[str, list[str]]


def find_files(inputs: list[str]) -> list[Path]:
    """Return the files alone of `find_inputs`."""
    return find_inputs(inputs).files


def find_inputs(inputs: list[str]) -> Inputs:
    """Find the files that `inputs` name (files, folders, glob patterns), each once, folders sorted by name.

    Folders are read with all folders in them, also those that a pattern matches. Passed over in them are hidden names,
    links to folders, token stores, and files whose ending no reader knows. A file given by name never is, one that a
    pattern matches only in a token store. Raises `UserError` for an input that is not there, or has no files.
    """
    found: dict[Path, Path] = {}
    passed_over: dict[Path, str] = {}
    for given in inputs:
        path, beside = Path(given), dict[Path, str]()
        matches = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(given, recursive=True))]
        if not matches:
            raise UserError(f"input '{given}' does not exist")
        inside = [path] if path.is_file() else list(_files_among(matches, beside))
        if not inside:
            first = "".join(f"; passed over: {p} ({reason})" for p, reason in list(beside.items())[:1])
            raise UserError(f"'{given}' has no input files ({_known_endings()}){first}")
        for file in inside:
            found.setdefault(file.resolve(), file)  # one file under two names must not be read twice
        passed_over |= beside
    by_reason: dict[str, list[str]] = {}
    for path, reason in passed_over.items():
        by_reason.setdefault(reason, []).append(path.name)
    return Inputs(files=list(found.values()), passed_over=by_reason)


def _files_among(matches: list[Path], passed_over: dict[Path, str]) -> Iterator[Path]:
    for path in matches:
        if store := next((p for p in (path, *path.parents) if is_store(p)), None):
            passed_over[store] = "token store"
        elif path.is_dir():
            yield from _files_in(path, passed_over)
        elif path.is_file():
            yield path
        else:
            passed_over[path] = "no file"


def _files_in(folder: Path, passed_over: dict[Path, str]) -> Iterator[Path]:
    try:
        content = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read folder '{folder}': {error.strerror}") from error
    for path in content:
        if reason := _why_passed_over(path):
            passed_over[path] = reason
        elif path.is_dir():
            yield from _files_in(path, passed_over)
        else:
            yield path


def _why_passed_over(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "link to a folder" if path.is_symlink() else "token store" if is_store(path) else None
    if not path.is_file():
        return "no file"
    return None if _is_known(path) else "unknown ending"


def plan_shards(files: list[Path], *, text_by: Literal["line", "file"], shard_bytes: int) -> list[Shard]:
    """Cut the files into shards, in order. Plain lines are cut at line ends; a compressed file is one
    shard. Raises `UserError` for a file that cannot be read, or whose ending no reader knows.
    """
    shards: list[Shard] = []
    for path in files:
        if not _is_known(path):
            raise UserError(f"{path}: unknown kind of file; known are {_known_endings()}")
        ending, compressed = _ending(path)
        if ending == ".parquet":
            shards += _parquet_shards(path, shard_bytes)
        elif ending in _TEXT_ENDINGS and text_by == "file":
            shards.append(_shard(path, "text_file"))
        else:
            kind: Kind = "text_lines" if ending in _TEXT_ENDINGS else "lines"
            shards += [_shard(path, kind)] if compressed else _line_shards(path, kind, shard_bytes)
    return shards


def hub_shards(name: str, *, config: str | None, split: str) -> list[Shard]:
    """Fetch a data set by hub name (or a local folder) through `datasets`, and cut its Arrow files into
    shards. `split` may be a slice or a sum of them: ``train[:10%]+test``. Raises `UserError` where it cannot be loaded.
    """
    import datasets

    try:
        tables = datasets.load_dataset(name, config)  # memory-mapped, all splits: the files hold whole ones
        lengths = {part: table.num_rows for part, table in tables.items()}
        spec = "+".join(lengths) if split == "all" else split
        slices = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except Exception as error:  # datasets, huggingface_hub, fsspec and pyarrow each raise their own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load '{name}' (split '{split}') through datasets: {first_line}") from error
    shards: list[Shard] = []
    for part in slices:
        files = [Path(place["filename"]) for place in tables[part.splitname].cache_files]
        shards += _arrow_shards(files, part.from_, part.to)
    return shards


def _arrow_shards(files: list[Path], begin: int, end: int) -> list[Shard]:
    """Cut rows `begin` … `end - 1` of the files, counted through all of them."""
    import datasets

    shards, first = [], 0
    for path in files:
        rows = datasets.Dataset.from_file(str(path)).num_rows
        low, high = max(begin - first, 0), min(end - first, rows)
        for start in range(low, high, _ROWS_A_SHARD):
            stop = min(start + _ROWS_A_SHARD, high)
            shards.append(_shard(path, "arrow", start=start, end=stop, first_row=start + 1))
        first += rows
    return shards


def read_records(shard: Shard, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | BadRow, Any]]:
    """Yield (row number, row or what is wrong with it, raw content for the side file). Blank lines are no
    rows. Raises `UserError` for a file that lacks a column, is damaged, or changed since its shards were planned.
    """
    shard.check_unchanged()
    if shard.kind == "parquet":
        yield from _parquet_rows(shard, columns)
    elif shard.kind == "arrow":
        yield from _arrow_rows(shard, columns)
    else:
        yield from _line_rows(shard, columns)
    shard.check_unchanged()


def _ending(path: Path) -> tuple[str, bool]:
    compressed = path.suffix.lower() in _COMPRESSIONS
    return (Path(path.stem).suffix if compressed else path.suffix).lower(), compressed


def _is_known(path: Path) -> bool:
    ending, compressed = _ending(path)
    return ending in _JSON_ENDINGS + _TEXT_ENDINGS or (ending == ".parquet" and not compressed)


def _known_endings() -> str:
    return f"{' '.join(_JSON_ENDINGS + _TEXT_ENDINGS)}, each also {' '.join(_COMPRESSIONS)}, and .parquet"


def _shard(path: Path, kind: Kind, *, start: int = 0, end: int = -1, first_row: int = 1) -> Shard:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not os.access(path, os.R_OK):
        raise UserError(f"cannot read {path}: permission denied")
    return Shard(
        path=str(path),
        kind=kind,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        start=start,
        end=end,
        first_row=first_row,
    )


def _line_shards(path: Path, kind: Kind, shard_bytes: int) -> list[Shard]:
    """Cut at the first line end after every `shard_bytes`, counting lines on the way."""
    shards, start, row = [], 0, 1
    size = _shard(path, kind).size
    with _open(path) as file:
        while start < size:
            lines = 0
            while (block := file.read(min(shard_bytes - (file.tell() - start), 1 << 22))) != b"":
                lines += block.count(b"\n")
            rest = file.readline()
            lines += rest.endswith(b"\n")
            end = file.tell()
            if end == start:  # the file became shorter; reading its shards says so
                break
            shards.append(_shard(path, kind, start=start, end=end, first_row=row))
            start, row = end, row + lines
    return shards


def _parquet_shards(path: Path, shard_bytes: int) -> list[Shard]:
    shards, start, row, held = [], 0, 1, 0
    rows = 0
    metadata = _parquet_file(path).metadata
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if held >= shard_bytes or group == metadata.num_row_groups - 1:
            shards.append(_shard(path, "parquet", start=start, end=group + 1, first_row=row))
            start, row, held, rows = group + 1, row + rows, 0, 0
    return shards


def _parquet_file(path: str | Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise UserError(f"{path} is no readable Parquet file: {error}") from error


def _parquet_rows(shard: Shard, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | BadRow, Any]]:
    file = _parquet_file(shard.path)
    _check_columns(shard.path, columns, file.schema_arrow.names)
    groups = list(range(shard.start, shard.end))
    number = shard.first_row
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
            for row in batch.to_pylist():
                yield number, row, row
                number += 1
    except (OSError, ValueError) as error:
        raise UserError(f"{shard.place(number)}: damaged Parquet file ({error})") from error


def _arrow_rows(shard: Shard, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | BadRow, Any]]:
    import pyarrow

    table = pyarrow.ipc.open_stream(pyarrow.memory_map(shard.path)).read_all()
    _check_columns(shard.path, columns, table.column_names)
    part = table.select(columns).slice(shard.start, shard.end - shard.start)
    number = shard.first_row
    for batch in part.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield number, row, row
            number += 1


def _check_columns(path: str, wanted: list[str], there: list[str]) -> None:
    if missing := [name for name in wanted if name not in there]:
        raise UserError(f"{path} has no column '{missing[0]}'; its columns are {', '.join(sorted(there))}")


def _line_rows(shard: Shard, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | BadRow, Any]]:
    if shard.kind == "text_file":
        raw = b"".join(line for _, line in _raw_lines(shard))
        yield 1, _text_row(raw.removeprefix(BOM_UTF8), columns[0]), raw
    elif shard.kind == "text_lines":
        for number, raw in _raw_lines(shard):
            text = raw.removeprefix(BOM_UTF8) if number == 1 else raw
            row = _text_row(text.rstrip(b"\r\n"), columns[0])
            if isinstance(row, BadRow) or not _is_blank(row[columns[0]]):
                yield number, row, raw
    else:
        for number, raw in _raw_lines(shard):
            if not raw.isspace():
                yield number, _json_row(raw), raw


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _raw_lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line with its end); damage of a compressed file is named with the last line
    read.
    """
    number = shard.first_row
    try:
        with _open(Path(shard.path)) as file:
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
        raise UserError(f"{shard.place(number)}: cannot read on, the file is damaged ({error})") from error
    if left > 0:
        raise UserError(f"{shard.path} became shorter while it was being read: run again when it is complete")


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow  # the zstandard package ends a truncated file without a word

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb", buffering=1 << 20)


_parse_json = json.JSONDecoder().raw_decode


def _json_row(raw: bytes) -> dict[str, Any] | BadRow:
    raw = raw.rstrip(b"\r\n")
    try:
        text = raw.decode()
        if text.startswith("{"):  # `json.loads` takes twice as long to look for white space around
            row, end = _parse_json(text)
            if end == len(text):
                return row
        row = json.loads(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return BadRow("invalid UTF-8", f"byte {error.start + 1} of the line is 0x{raw[error.start]:02x}")
    except json.JSONDecodeError as error:
        hint = "; is this a JSON array? One object a line is needed" if raw.lstrip()[:1] == b"[" else ""
        return BadRow("broken JSON", f"{error.msg} at column {error.pos + 1}{hint}")
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        return BadRow("broken JSON", str(error))
    if not isinstance(row, dict):
        return BadRow("broken JSON", f"expected an object, found {type(row).__name__}")
    return row


def _text_row(raw: bytes, column: str) -> dict[str, Any] | BadRow:
    try:
        return {column: raw.decode("utf-8")}
    except UnicodeDecodeError as error:
        return BadRow("invalid UTF-8", f"byte {error.start + 1} is 0x{raw[error.start]:02x}")
