"""A valid file, damaged in every way that disks, crashes and strangers know: input for the fuzz of a parser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

# In the place of any value.
WRONG_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 63, 10**39, 0.5, float("nan"), float("inf"), -1e308, "", "x", "\0", "\ud83d", "[/red]",
    "../../x", "/dev/zero", "x" * 5000, [], [[]], [None], {}, {"": {}}, {"step": "x"},
)  # fmt: skip
_BYTES = (b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"{", b"[", b"\n", b"\\", b"\x1b[31m", b"9" * 5000, b"1e999")
_WHOLE = (
    b"", b"\0" * 64, b"null", b"[]", b"{}", b"3", b'"x"', b"true", b"\xff\xfe", b"[" * 50_000, b'{"a":' * 50_000,
    b"[" * 300 + b"]" * 300, b"\xef\xbb\xbf{}",
)  # fmt: skip


def damaged(content: bytes, *, count: int) -> Iterator[bytes]:
    """`count` damaged forms of `content`; where it is JSON, also with values of other types.

    They are drawn by the seed of `tests/fresh_inputs.py`. First come contents that have nothing of it.
    """
    rng = np.random.default_rng()
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    yield from _WHOLE
    for number in range(count):
        if value is not None and number % 2:
            yield json.dumps(_exchanged(value, rng)).encode()
        else:
            yield _mangled(content, rng)


def _mangled(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut, with bytes flipped, put in, or repeated."""
    at, to = sorted(rng.integers(0, len(content) + 1, 2).tolist())
    match rng.integers(5):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + content[to:]
        case 2:
            return content[:to] + content[at:]
        case 3:
            return content[:at] + _BYTES[rng.integers(len(_BYTES))] + content[at:]
        case _:
            return bytes(
                byte ^ (1 << int(rng.integers(8))) if rng.random() < 0.02 else byte for byte in content
            )


def _exchanged(value: Any, rng: np.random.Generator) -> Any:
    """A copy in which one value, at any depth, is of another type, or missing."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return WRONG_VALUES[rng.integers(len(WRONG_VALUES))]
    copy = value.copy()
    keys = list(copy) if isinstance(copy, dict) else list(range(len(copy)))
    key = keys[rng.integers(len(keys))]
    if rng.random() < 0.15:
        del copy[key]
    else:
        copy[key] = _exchanged(copy[key], rng)
    return copy
