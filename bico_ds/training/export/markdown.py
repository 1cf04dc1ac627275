"""Markdown in which a text of unknown origin stays a text: no link, image, heading or HTML comes of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bico_ds.common.printable import on_one_line

_MOST = 2000
_ACTIVE = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~&:@$])")


def plain(text: str) -> str:
    """A text as it stands, on one line: CommonMark shows every character of punctuation after a backslash as itself."""
    return _ACTIVE.sub(r"\\\1", on_one_line(text.strip(), most=_MOST))


def code(text: str) -> str:
    """A word or name in the type of code; a backtick in it would end it."""
    shown = on_one_line(text, most=_MOST).replace("`", "'").strip()
    return f"`{shown}`" if shown else ""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; the cells are Markdown. Without rows there is none."""
    body = [_row(row) for row in rows]
    return [_row(headers), _row(["---"] * len(headers)), *body] if body else []


def _row(cells: Sequence[str]) -> str:
    # A bar that code has, too, must be escaped in a cell.
    return f"| {' | '.join(re.sub(r'(?<!\\)[|]', r'\\|', cell) for cell in cells)} |"
