"""Tables that keep every word whole at any width of a terminal. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.box import HEAVY_HEAD, SIMPLE_HEAD, Box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

# Where a line may end: behind a blank; and, where that is not enough, inside of a name (runs/seed-11/tiny_bico), never
# before a digit.
_AT_BLANKS = re.compile(r"(?<=\s)(?=\S)")
_IN_NAMES = re.compile(r"(?<=\s)(?=\S)|(?<=[^\W_][/_=.-])(?=[^\W\d_])")


_WIDE = 100


class _Frame(NamedTuple):
    """What stands around cells: so many characters `between` two of them, and `outside` of all, of them `indent` blanks."""

    box: Box
    padding: tuple[int, int, int, int]
    has_edge: bool
    between: int
    outside: int
    indent: int


_BOXED = _Frame(HEAVY_HEAD, (0, 1, 0, 1), True, 3, 4, 0)
_LIGHT = _Frame(SIMPLE_HEAD, (0, 1, 0, 0), False, 2, 0, 0)
_INDENTED = _LIGHT._replace(outside=1, indent=1)


@dataclass(frozen=True, kw_only=True)
class _Column:
    header: str
    right: bool
    whole: bool
    style: str

    def pieces(self, cell: str, ends: re.Pattern[str]) -> list[str]:
        return [cell] if self.whole else ends.split(cell)


class FittingTable:
    """A table in the first form that fits: with a box, with a line below its headers, as `instead`, as a list of its cells.

    On a terminal of less than `_WIDE` columns, where some tables would have a box and others not, none has one. One that is
    never `boxed` is indented by a blank, as a part of a text.

    A line of a cell ends at a blank, or inside of a name where a form fits in no other way; a figure and a `whole` cell stay
    on one line. Only in the list is what is wider than the terminal cut. Cells and headers are text, without markup.
    """

    def __init__(
        self,
        *,
        title: str = "",
        caption: str = "",
        boxed: bool = True,
        show_header: bool = True,
        instead: FittingTable | None = None,
    ) -> None:
        self._title, self._caption = title, caption
        self._boxed = boxed
        self._show_header = show_header
        self._instead = instead
        self._columns: list[_Column] = []
        self._rows: list[tuple[list[Text], str]] = []

    @property
    def row_count(self) -> int:
        return len(self._rows)

    def add_column(self, header: str, *, right: bool = False, whole: bool = False, style: str = "") -> None:
        """A column, justified to the `right` or to the left; `whole`: no line ends inside of its cells."""
        self._columns.append(_Column(header=header, right=right, whole=whole, style=style))

    def add_row(self, *cells: str | Text, style: str = "") -> None:
        """A row, with a cell for each column."""
        assert len(cells) == len(self._columns), f"{len(cells)} cells for {len(self._columns)} columns"
        texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
        self._rows.append((texts, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        if self._title:
            yield _wrapped(Text(self._title, style="table.title"), width, _AT_BLANKS)
        yield from self._fitting(width)
        if self._caption:
            yield _wrapped(Text(self._caption, style="table.caption"), width, _AT_BLANKS)

    def _fitting(self, width: int) -> Iterator[RenderableType]:
        forms = [form for form in (self, self._instead) if form is not None]
        for ends in (_AT_BLANKS, _IN_NAMES):
            for form in forms:
                for frame in form._frames(width, ends):
                    room = width - frame.outside - frame.between * (len(form._columns) - 1)
                    if (widths := form._widths(room, ends)) is not None:
                        table = form._table(widths, ends, frame)
                        yield Padding(table, (0, 0, 0, frame.indent), expand=False)
                        return
        yield from self._list(width)

    def _frames(self, width: int, ends: re.Pattern[str]) -> list[_Frame]:
        """Those that are tried. Inside of names a line ends only where it must, and a box takes room."""
        if not self._boxed:
            return [_INDENTED]
        return [_BOXED, _LIGHT] if width >= _WIDE and ends is _AT_BLANKS else [_LIGHT]

    def _widths(self, room: int, ends: re.Pattern[str]) -> list[int] | None:
        """Of each column, together at most `room`; None where that is less than their longest pieces."""
        least, most = [], []
        for index, column in enumerate(self._columns):
            cells = [cells[index].plain for cells, _ in self._rows]
            pieces = [piece for cell in cells for piece in column.pieces(cell, ends)]
            if self._show_header:
                cells.append(column.header)
                pieces += ends.split(column.header)
            least.append(max((cell_len(piece.strip()) for piece in pieces), default=0))
            most.append(max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0))
        spare = room - sum(least)
        if spare < 0:
            return None
        # Those that want little get it: the longest text of a table has many lines in any case.
        widths = list(least)
        for index in sorted(range(len(widths)), key=lambda index: most[index] - least[index]):
            more = min(most[index] - least[index], spare)
            widths[index], spare = least[index] + more, spare - more
        return widths

    def _table(self, widths: Sequence[int], ends: re.Pattern[str], frame: _Frame) -> Table:
        table = Table(
            box=frame.box, padding=frame.padding, show_edge=frame.has_edge, pad_edge=frame.has_edge,
            show_header=self._show_header,
        )  # fmt: skip
        for column, width in zip(self._columns, widths, strict=True):
            table.add_column(
                _wrapped(Text(column.header), width, ends), width=width, no_wrap=True, overflow="fold",
                justify="right" if column.right else "left", style=column.style,
            )  # fmt: skip
        for cells, style in self._rows:
            lines = [
                cell if column.whole else _wrapped(cell, width, ends)
                for cell, column, width in zip(cells, self._columns, widths, strict=True)
            ]
            table.add_row(*lines, style=style)
        return table

    def _list(self, width: int) -> Iterator[Text]:
        """Each row as its first cell, and below it the others behind their headers."""
        for (first, *others), style in self._rows:
            yield _wrapped(first, width, _IN_NAMES)
            for column, cell in zip(self._columns[1:], others, strict=True):
                header = " ".join(column.header.split()) if self._show_header else ""
                shown = Text.assemble(f"{header}: " if header else "", cell, style=style)
                if cell_len(shown.plain) > width - 2:  # the cell whole, below its header, if it can be
                    shown = Text.assemble(f"{header}:\n" if header else "", cell, style=style)
                if cell.plain:
                    lines = _wrapped(shown, width - 2, _IN_NAMES).split("\n")
                    yield Text("\n").join(Text("  ").append_text(line) for line in lines)


def _wrapped(text: Text, width: int, ends: re.Pattern[str]) -> Text:
    """With line breaks, so that no line is wider than `width`, unless a piece that stays whole is."""
    lines, start, end = [], 0, 0
    for piece in ends.split(text.plain):
        stop = end + len(piece)
        is_full = cell_len(text.plain[start:stop].rstrip()) > width
        if end > start and (is_full or text.plain[start:end].endswith("\n")):
            lines.append((start, end))
            start = end
        end = stop
    lines.append((start, end))
    parts = [text[start : start + len(text.plain[start:end].rstrip())] for start, end in lines]
    return Text("\n", style=text.style).join(parts)
