"""Markdown in which a text of unknown origin stays a text: no link, image, heading or HTML comes of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bico_ds.common.printable import on_one_line

_MOST = 2000
_BAR, _ESCAPED_BAR = re.compile(r"(?<!\\)[|]"), r"\|"
# What begins a link, an image, code, HTML, a table's cell or a formula; at the start of a line a heading, list or rule, too.
# An underscore inside a word begins nothing.
_ACTIVE = re.compile(
    r"[\\`*\[\]<>|~&$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.|^[#+=-]|^\d+[.)]"
)


def plain(text: str) -> str:
    """A text as it stands, on one line: CommonMark shows every character of punctuation after a backslash as itself."""
    return _ACTIVE.sub(_escaped, on_one_line(text.strip(), most=_MOST))


def _escaped(found: re.Match[str]) -> str:
    return f"{found[0][:-1]}\\{found[0][-1]}"


def code(text: str) -> str:
    """A word or name in the type of code; a backtick in it would end it."""
    shown = on_one_line(text, most=_MOST).replace("`", "'").strip()
    return f"`{shown}`" if shown else ""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; the cells are Markdown. Without rows there is none."""
    body = [_row(row) for row in rows]
    return [_row(headers), _row(["---"] * len(headers)), *body] if body else []


def _row(cells: Sequence[str]) -> str:
    # A bar in code ends a cell, too, unless it is escaped.
    return f"| {' | '.join(_BAR.sub(_ESCAPED_BAR, cell) for cell in cells)} |"
