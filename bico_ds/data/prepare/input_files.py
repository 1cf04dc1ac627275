"""Input files: which ones the inputs name, what their endings mean, and how they are opened."""

from __future__ import annotations

import glob
import gzip
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bico_ds.common.errors import UserError
from bico_ds.data.store import is_store

JSON_ENDINGS, TEXT_ENDINGS = (".jsonl", ".ndjson", ".json"), (".txt", ".text", ".md")
_COMPRESSIONS = (".gz", ".zst")
# What a compressed file may become: JSONL of one text again and again shrinks to a hundredth, a bomb to a thousandth.
_MOST_RATIO, _ALWAYS_ALLOWED_BYTES = 200, 1 << 30


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
    links to folders, token stores, and files whose ending no reader knows. A file given by name is never passed over, one
    that a pattern matches only in a token store. Raises `UserError` for an input that is not there, or has no files.
    """
    found: dict[Path, Path] = {}
    passed_over: dict[Path, str] = {}
    for given in inputs:
        beside: dict[Path, str] = {}
        try:
            for file in _files_of(given, beside):
                found.setdefault(file.resolve(), file)  # one file under two names must not be read twice
        except UserError:
            raise
        # A name too long, no permission on the way, links in a circle, a NUL, folders nested without end.
        except (OSError, ValueError, RuntimeError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise UserError(f"cannot read input '{printable(given):.200}': {reason}") from error
        passed_over |= beside
    by_reason: dict[str, list[str]] = {}
    for path, reason in passed_over.items():
        by_reason.setdefault(reason, []).append(printable(path.name))
    return Inputs(files=list(found.values()), passed_over=by_reason)


def printable(name: object) -> str:
    """A path, or other text from outside, for messages and reports: what UTF-8 cannot write of it stands there escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def _files_of(given: str, passed_over: dict[Path, str]) -> list[Path]:
    """The files that an input names; there is at least one."""
    path = Path(given)
    matches = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(given, recursive=True))]
    if not matches:
        raise UserError(f"input '{printable(given)}' does not exist; correct the path, or copy it here")
    inside = [path] if path.is_file() else list(_files_among(matches, passed_over))
    if not inside:
        first = "".join(f"; passed over: {printable(p)} ({why})" for p, why in list(passed_over.items())[:1])
        raise UserError(f"'{printable(given)}' has no input files ({known_endings()}){first}")
    return inside


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
    return None if is_known(path) else "unknown ending"


def is_known(path: Path) -> bool:
    """Return whether there is a reader for a file with this name."""
    ending, compressed = ending_of(path)
    return ending in JSON_ENDINGS + TEXT_ENDINGS or (ending == ".parquet" and not compressed)


def known_endings() -> str:
    """List the endings that have a reader, for messages."""
    return f"{' '.join(JSON_ENDINGS + TEXT_ENDINGS)}, each also {' '.join(_COMPRESSIONS)}, and .parquet"


def ending_of(path: Path) -> tuple[str, bool]:
    """Return the ending in lower case, without that of a compression, and whether there was one."""
    compressed = path.suffix.lower() in _COMPRESSIONS
    return (Path(path.stem).suffix if compressed else path.suffix).lower(), compressed


def open_lines(path: Path) -> BinaryIO:
    """Open a file of lines, and decompress it on the way where its ending asks for that."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow  # the zstandard package raises nothing at the end of a truncated file

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb", buffering=1 << 20)


def most_bytes_of(path: Path, size: int) -> float:
    """How many bytes a file of lines of `size` bytes may have, decompressed, before it is taken for a bomb."""
    if path.suffix.lower() not in _COMPRESSIONS:
        return math.inf
    return max(_MOST_RATIO * size, _ALWAYS_ALLOWED_BYTES)


def open_parquet(path: str | Path) -> Any:
    """Open a `pyarrow.parquet.ParquetFile`. Raises `UserError` where it is none."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise UserError(
            f"{printable(path)} is no readable Parquet file: {' '.join(str(error).split())}; fetch or write it again"
        ) from error
