"""The header of a safetensors file, read by the rules of its format before any library maps the file.

A file holds 8 bytes with the header's length (little-endian), the header (a JSON object: by each tensor's name its dtype,
shape and place), and the tensors' bytes, without gaps: https://github.com/huggingface/safetensors. A stranger may have
written it, and a download may have ended early: what safetensors refuses is refused here, with the file's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

from safetensors import SafetensorError, safe_open

from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, parse_object

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # as in safetensors
_MOST_DIMENSIONS = 64  # as in torch
_MOST_BYTES = 2**63 - 1
_METADATA = "__metadata__"
_LFS_POINTER = b"version https://git-lfs"
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: `dtype` by its name in safetensors, `begin` the byte of the file at which it begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors in a safetensors file, in the order of the header; none of their bytes are read.

    Raises `UserError` where the file cannot be read, is cut short, or is no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            content = _header_bytes(stream, file, size)
    except OSError as error:
        raise UserError(f"model.path: '{file}' cannot be read: {error.strerror or error}") from error
    try:
        header = parse_object(content, file)
    except JsonError as error:
        _damaged(file, f"header: {error.reason}")
    if content[:1] != b"{":
        _damaged(file, "its header does not begin with a brace")
    metadata = header.pop(_METADATA, None)
    if not (metadata is None or _is_text_by_text(metadata)):
        _damaged(file, f"header: {_METADATA} must hold texts by name")
    data = _LENGTH_BYTES + len(content)
    places = [(name, *_place(entry, name, file)) for name, entry in header.items()]
    end = data + _end_of_data(places, file)
    if size != end:
        raise UserError(f"model.path: '{file}' has {size} bytes, {end} by its header: copy it again")
    _check_library_takes(file)
    return [
        StoredTensor(name=name, dtype=dtype, shape=shape, begin=data + begin)
        for name, dtype, shape, begin, _ in places
    ]


def _header_bytes(stream: BinaryIO, file: Path, size: int) -> bytes:
    start = stream.read(_LENGTH_BYTES)
    if start == _LFS_POINTER[:_LENGTH_BYTES]:
        raise UserError(
            f"model.path: '{file}' is a pointer of Git LFS, not the weights: fetch them there with `git lfs pull`"
        )
    length = int.from_bytes(start, "little")
    if len(start) == _LENGTH_BYTES and length > _MOST_HEADER_BYTES:
        _damaged(file, f"its header would have {length:,} bytes, and {_MOST_HEADER_BYTES:,} are the most")
    if size < _LENGTH_BYTES + length:
        raise UserError(
            f"model.path: '{file}' is cut short or no safetensors file ({size} bytes): copy it again"
        )
    return stream.read(length)


def _check_library_takes(file: Path) -> None:
    """Raise `UserError` for what safetensors' own parser takes for no header, such as a dtype given twice."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        _damaged(file, f"safetensors: {error}")


def _place(entry: Any, name: str, file: Path) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of a tensor, bytes counted from the end of the header."""
    if not isinstance(entry, dict):
        _damaged(file, f"tensor {_shown(name)}: its entry is no object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        _damaged(file, f"tensor {_shown(name)}: dtype {_shown(dtype)} is none of safetensors'")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        _damaged(file, f"tensor {_shown(name)}: its shape must be a list of sizes, found {_shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _damaged(
            file,
            f"tensor {_shown(name)}: data_offsets must be its first byte and its end, found {_shown(offsets)}",
        )
    begin, end = offsets
    if math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        _damaged(
            file,
            f"tensor {_shown(name)}: {dtype} of shape {_shown(shape)} does not take the {end - begin} bytes of its offsets",
        )
    return dtype, tuple(shape), begin, end


def _end_of_data(places: list[tuple[str, str, tuple[int, ...], int, int]], file: Path) -> int:
    """The bytes of all tensors, which lie one behind the other."""
    end = 0
    for name, _, _, begin, stop in sorted(places, key=lambda place: place[3:]):
        if begin != end:
            how = "overlaps with another" if begin < end else "leaves a gap before it"
            _damaged(
                file, f"tensor {_shown(name)} begins at byte {begin} and {how}, which ends at byte {end}"
            )
        end = stop
    return end


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MOST_BYTES for value in values
    )


def _is_text_by_text(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _damaged(file: Path, reason: str) -> NoReturn:
    raise UserError(f"model.path: '{file}' is no safetensors file, or damaged ({reason}): copy it again")
