"""Whether what is printed in few columns has all its words whole."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from rich.cells import cell_len
from rich.console import Console

_IN_NAMES = re.compile(r"(?<=[^\W_][/_=.-])(?=[^\W\d_])")
_STROKES = re.compile(r"[\s\u2500-\u257f]+")


def shown(show: Callable[[Console], object], width: int) -> str:
    """What `show` prints on a console of so many columns."""
    out = io.StringIO()
    show(Console(file=out, width=width))
    return out.getvalue()


def words(text: str, *, of_names: bool = False) -> set[str]:
    """Without the colons that follow headers in a list, and the strokes of tables; `of_names`: the parts of names, too."""
    found = {word.rstrip(":") for word in _STROKES.split(text)}
    if of_names:
        found = {part for word in found for part in _IN_NAMES.split(word)}
    return found - {""}


def check_whole(
    show: Callable[[Console], object],
    width: int,
    *,
    may_differ: AbstractSet[str] = frozenset(),
    names_may_break: bool = False,
) -> str:
    """Assert that no line is wider, and that the words are those of a wide console; returns what is printed.

    `may_differ`: headers that one form of a table has, and another one has not.
    """
    text = shown(show, width)
    assert [line for line in text.splitlines() if cell_len(line) > width] == []
    found, wanted = (words(shown(show, columns), of_names=names_may_break) for columns in (width, 1000))
    assert found ^ wanted <= may_differ
    return text
