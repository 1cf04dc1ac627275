"""JSON that another program, an earlier run, or a stranger wrote: read within bounds, with one kind of error.

What is read is a value of JSON's types and nothing more is known of it: the caller checks what it holds, and says in its
own words what to do about a `JsonError`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 1 << 26  # 64 MiB: the largest index of a model, or manifest of a checkpoint, has some MB
_MOST_DEPTH = (
    100  # what is nested deeper is no file that a program writes, and ends Python's recursion somewhere later
)
_MOST_DIGITS = 40  # states of random generators have 39
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """A file that is not the JSON that it should be.

    `reason` says why, without the path, and fits behind a colon. `is_missing`: there is no such file.
    """

    def __init__(self, path: Path, reason: str, *, is_missing: bool = False) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.is_missing = path, reason, is_missing


def read_json(path: Path, *, strict: bool = True, most_bytes: int = MOST_BYTES) -> Any:
    """The value in a JSON file of at most `most_bytes` bytes, as `parse_json` takes it. Raises `JsonError`."""
    return parse_json(read_bounded(path, most_bytes=most_bytes), path, strict=strict)


def read_object(path: Path, *, strict: bool = True, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file, as `read_json` reads it; a `JsonError`, too, for any other value."""
    return _object(read_json(path, strict=strict, most_bytes=most_bytes), path)


def parse_json(content: bytes | str, path: Path, *, strict: bool = True) -> Any:
    """The value that `content`, of the file `path`, holds, in UTF-8 with or without a byte order mark.

    Raises `JsonError` for anything else, for values nested deeper than 100 and integers of more than 40 digits. `strict`
    refuses, too, what other programs do not take and ours may write: NaN, infinite numbers, and halves of characters
    (lone surrogates). Of a key that comes twice the last value counts.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise JsonError(path, f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip("\0 \t\r\n"):  # a crash can leave a file of zeros
        raise JsonError(path, "empty")
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_finite if strict else None,
            parse_constant=_refuse_constant if strict else None,
        )
        if strict and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        if text.count("[") + text.count("{") > _MOST_DEPTH and _is_deep(value):
            raise RecursionError
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise JsonError(path, f"not valid JSON ({error.msg}, {where})") from None
    except UnicodeEncodeError:
        raise JsonError(path, "has a lone surrogate, which is half a character") from None
    except RecursionError:
        raise JsonError(path, f"nested deeper than {_MOST_DEPTH} levels") from None
    except ValueError as error:
        raise JsonError(path, str(error)) from None
    return value


def parse_object(content: bytes | str, path: Path, *, strict: bool = True) -> dict[str, Any]:
    """The object that `content` holds, as `parse_json` takes it; a `JsonError`, too, for any other value."""
    return _object(parse_json(content, path, strict=strict), path)


def read_object_lines(path: Path, *, most_bytes: int = MOST_BYTES) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none where it is missing.

    Lines that are no objects (cut by a crash, damaged) are passed over. Raises `JsonError` where the file cannot be read.
    """
    try:
        content = read_bounded(path, most_bytes=most_bytes)
    except JsonError as error:
        if error.is_missing:
            return []
        raise
    return [found for line in content.split(b"\n") if (found := object_in(line, path)) is not None]


def append_object(path: Path, value: dict[str, Any]) -> None:
    """Add a line to a file of JSON lines, on a line of its own where a crash has cut the last one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write(json.dumps(value).encode() + b"\n")


def object_in(line: bytes | str, path: Path) -> dict[str, Any] | None:
    """The object on a line of `path`; None where the line is anything else."""
    try:
        return parse_object(line, path, strict=False)
    except JsonError:
        return None


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_bounded(path: Path, *, most_bytes: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file that has at most `most_bytes`. Raises `JsonError`; never waits for a pipe's writer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise JsonError(path, "a folder, not a file" if path.is_dir() else "not a regular file")
            content = file.read(most_bytes + 1)
    except IsADirectoryError:
        raise JsonError(path, "a folder, not a file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise JsonError(path, "no such file", is_missing=True) from None
    except OSError as error:
        raise JsonError(path, str(error.strerror or error)) from None
    except ValueError as error:  # a NUL, or half a character, in its name
        if isinstance(error, JsonError):
            raise
        raise JsonError(path, str(error), is_missing=True) from None
    if len(content) > most_bytes:
        raise JsonError(path, f"larger than {most_bytes:,} bytes")
    return content


def _object(value: Any, path: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise JsonError(path, f"holds {_kind(value)}, not an object")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    return "a list" if isinstance(value, list) else "a text" if isinstance(value, str) else "a number"


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"has an integer of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"has a number that is too large ({digits[:20]})")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"has {name}, which is no number of JSON")


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than `_MOST_DEPTH`."""
    level = [value]
    for _ in range(_MOST_DEPTH + 1):
        if not level:
            return False
        nested = (x.values() if isinstance(x, dict) else x if isinstance(x, list) else () for x in level)
        level = [x for x in chain.from_iterable(nested) if isinstance(x, dict | list)]
    return True
