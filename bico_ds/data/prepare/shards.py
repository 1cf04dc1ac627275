"""Shards: the parts of the input files that workers read, each by one worker at a time.

`datasets` fetches what has a hub name; its Arrow files become shards too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bico_ds.common.errors import UserError
from bico_ds.data.prepare.input_files import (
    TEXT_ENDINGS,
    ending_of,
    is_known,
    known_endings,
    open_lines,
    open_parquet,
    printable,
)

Kind = Literal["lines", "text_lines", "text_file", "parquet", "arrow"]
SHARD_BYTES = 32 << 20
_RECORDS_PER_SHARD = 50_000
_REST_BYTES = 1 << 22  # of a line, at a time


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of one file that one worker reads at a time, and how the file looked when the work was planned."""

    path: str
    kind: Kind
    # Bytes of the file.
    size: int
    modified_ns: int
    # In bytes (lines), row groups (parquet) or records (arrow); end -1: to the end of the file.
    start: int = 0
    end: int = -1
    first_record: int = 1

    def where(self, record: int) -> str:
        """Name a record for messages: by its line, or by its row where the file holds a table."""
        path = printable(self.path)
        return f"{path}: row {record}" if self.kind in ("parquet", "arrow") else f"{path}:{record}"

    def check_unchanged(self) -> None:
        """Raise `UserError` if the file is not what it was when the work was planned."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise UserError(
                f"{printable(self.path)} vanished while it was being read ({error.strerror})"
            ) from error
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
            raise UserError(
                f"{printable(self.path)} changed while it was being read: run again when it is complete"
            )


def plan_shards(files: list[Path], *, text_by: Literal["line", "file"], shard_bytes: int) -> list[Shard]:
    """Cut the files into shards, in order: plain lines at line ends; a compressed file is one shard.

    Raises `UserError` for a file that cannot be read, or whose ending no reader knows.
    """
    shards: list[Shard] = []
    for path in files:
        if not is_known(path):
            raise UserError(f"{path}: unknown kind of file; known are {known_endings()}")
        ending, compressed = ending_of(path)
        if ending == ".parquet":
            shards += _parquet_shards(path, shard_bytes)
        elif ending in TEXT_ENDINGS and text_by == "file":
            shards.append(_shard(path, "text_file"))
        else:
            kind: Kind = "text_lines" if ending in TEXT_ENDINGS else "lines"
            shards += [_shard(path, kind)] if compressed else _line_shards(path, kind, shard_bytes)
    return shards


def hub_shards(name: str, *, config: str | None, split: str) -> list[Shard]:
    """Fetch a data set by hub name (or a local folder) through `datasets`, and cut its Arrow files into shards.

    `split` may be a slice or a sum of them: `train[:10%]+test`. Raises `UserError` where it cannot be loaded.
    """
    import datasets

    try:
        # All splits, memory-mapped: the files hold complete ones.
        tables = datasets.load_dataset(name, config, trust_remote_code=False)
        lengths = {part: table.num_rows for part, table in tables.items()}
        spec = "+".join(lengths) if split == "all" else split
        slices = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except Exception as error:  # datasets, huggingface_hub, fsspec and pyarrow each raise their own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load '{name}' (split '{split}') through datasets: {first_line}") from error
    shards: list[Shard] = []
    for part in slices:
        files = [Path(file["filename"]) for file in tables[part.splitname].cache_files]
        shards += _arrow_shards(files, part.from_, part.to)
    return shards


def _arrow_shards(files: list[Path], begin: int, end: int) -> list[Shard]:
    """Cut records `begin` … `end - 1` of the files, counted through all of them."""
    import datasets

    shards, first = [], 0
    for path in files:
        records = datasets.Dataset.from_file(str(path)).num_rows
        low, high = max(begin - first, 0), min(end - first, records)
        for start in range(low, high, _RECORDS_PER_SHARD):
            stop = min(start + _RECORDS_PER_SHARD, high)
            shards.append(_shard(path, "arrow", start=start, end=stop, first_record=start + 1))
        first += records
    return shards


def _line_shards(path: Path, kind: Kind, shard_bytes: int) -> list[Shard]:
    """Cut at the first line end after every `shard_bytes`, counting lines on the way."""
    shards, start, record = [], 0, 1
    size = _shard(path, kind).size
    with open_lines(path) as file:
        while start < size:
            lines = 0
            while (block := file.read(min(shard_bytes - (file.tell() - start), 1 << 22))) != b"":
                lines += block.count(b"\n")
            while rest := file.readline(_REST_BYTES):  # in parts: a line need not end
                lines += rest.endswith(b"\n")
                if rest.endswith(b"\n"):
                    break
            end = file.tell()
            if end == start:  # the file became shorter, which its reader will report
                break
            shards.append(_shard(path, kind, start=start, end=end, first_record=record))
            start, record = end, record + lines
    return shards


def _parquet_shards(path: Path, shard_bytes: int) -> list[Shard]:
    shards, start, first_record = [], 0, 1
    held_bytes = held_records = 0
    metadata = open_parquet(path).metadata
    for group in range(metadata.num_row_groups):
        held_bytes += metadata.row_group(group).total_byte_size
        held_records += metadata.row_group(group).num_rows
        if held_bytes >= shard_bytes or group == metadata.num_row_groups - 1:
            shards.append(_shard(path, "parquet", start=start, end=group + 1, first_record=first_record))
            start, first_record = group + 1, first_record + held_records
            held_bytes = held_records = 0
    return shards


def _shard(path: Path, kind: Kind, *, start: int = 0, end: int = -1, first_record: int = 1) -> Shard:
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
        first_record=first_record,
    )
