"""HTML of the report, built from parts: whatever is no `Html` is text, and is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape, unescape
from typing import Any

_VOID = frozenset(("meta", "circle", "rect", "line", "path", "polyline", "use"))
_UNBROKEN = re.compile(r"\S{12}(?=\S)")


class Html(str):
    """Markup that is complete: it is written as it is."""

    __slots__ = ()

    def text(self) -> str:
        """Without its elements, as a reader sees it."""
        return unescape(re.sub(r"<[^>]*>", "", self))


def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element of HTML or SVG; a child that is None is left out, and so is an attribute that is None or False.

    `class_` is written as `class`, and `_` in other names as `-`.
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_text(value)}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID and not children:
        return Html(f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{joined(children)}</{tag}>")


def joined(parts: Iterable[Any]) -> Html:
    """Parts one after the other."""
    return Html(
        "".join(part if isinstance(part, Html) else _text(part) for part in parts if part is not None)
    )


def _text(value: Any) -> str:
    """What a reader sees as it is, a blank for what would reorder the words after it, or is no text."""
    shown = (character if character.isprintable() or character == "\n" else " " for character in str(value))
    return escape("".join(shown))


def _breakable(text: Any) -> Any:
    """A text that a column narrower than its longest word breaks: names of runs have no blank."""
    if isinstance(text, Html):
        return text
    pieces = _UNBROKEN.sub("\\g<0>\n", str(text).replace("\n", " ")).split("\n")
    return Html("<wbr/>".join(map(_text, pieces)))


def section(identifier: str, heading: str, *children: Any) -> Html:
    """A section of the page under its own heading."""
    title = element("h2", heading, id=f"{identifier}-heading")
    return element("section", title, *children, id=identifier, aria_labelledby=f"{identifier}-heading")


def table(
    caption: str,
    headers: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    words: Sequence[str] = (),
    as_cards: bool = False,
) -> Html:
    """A table that scrolls in a box of its own; the first cell of a row is its header.

    Columns are of numbers, right-aligned, but for the first and those whose header is among `words`. `as_cards`: on a
    narrow screen each row is a card, with the headers of the columns before its cells.
    """
    kinds = ["words" if number == 0 or name in words else None for number, name in enumerate(headers)]
    columns = list(zip(headers, kinds, strict=True))
    head = [
        element("th", _breakable(name), scope="col", class_=kind, role="columnheader")
        for name, kind in columns
    ]
    body = [
        element(
            "tr",
            element("th", _breakable(row[0]), scope="row", class_="words", role="rowheader"),
            *(
                element(
                    "td",
                    _breakable(cell) if kind else cell,
                    class_=kind,
                    role="cell",
                    data_label=name if as_cards else None,
                )
                for cell, (name, kind) in zip(row[1:], columns[1:], strict=True)
            ),
            role="row",
        )
        for row in rows
    ]
    # A table that is laid out as cards is none to a browser, but for the roles that are said.
    found = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head, role="row"), role="rowgroup"),
        element("tbody", *body, role="rowgroup"),
        role="table",
        class_="cards" if as_cards else None,
    )
    # A box that scrolls must be in reach of the keyboard, and have a name there.
    return element("div", found, class_="scroll", role="region", aria_label=caption, tabindex="0")


def details(summary: str, *children: Any) -> Html:
    """What is shown on demand, and in print."""
    return element("details", element("summary", summary), *children)


def listed(items: Iterable[Any], *, class_: str | None = None) -> Html:
    """A list without an order."""
    return element("ul", *(element("li", item) for item in items), class_=class_)


def code(lines: Iterable[str]) -> Html:
    """Lines to be copied."""
    return element("pre", element("code", "\n".join(lines)), tabindex="0")
